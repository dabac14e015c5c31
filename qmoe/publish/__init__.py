"""What is done with a finished checkpoint: verify, export, push with a card."""
