"""Mixture-of-experts models below one bit per expert weight, run without unpacking.

Importing the package registers the format with transformers.
"""

from qmoe.load import load
from qmoe.models import register

__all__ = ["load"]
register()  # model types of ours, for imported checkpoints
__version__ = "0.1.0"
