"""The write path from end to end: plan, probe, one block after another, resume."""
