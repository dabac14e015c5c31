"""Number formats in which checkpoints are published -> dense tensors."""
