"""Mixture-of-experts models below one bit per expert weight, run without unpacking.

Importing the package registers the format with transformers.
"""

from qmoe.load import load

__all__ = ["load"]
__version__ = "0.1.0"
