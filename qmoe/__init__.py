"""Mixture-of-experts models below one bit per expert weight, run without unpacking."""

__version__ = "0.1.0"
