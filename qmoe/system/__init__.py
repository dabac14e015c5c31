"""What the machine gives: durable files, tensor files, processes, memory. Knows no model."""
