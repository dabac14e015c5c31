"""Mixture-of-experts models below one bit per expert weight, run without unpacking.

Importing the package registers the format with transformers.
"""

from qmoe.inference.load import load
from qmoe.models.projects import register
from qmoe.version import __version__

__all__ = ["__version__", "load"]
register()  # model types of ours, for imported checkpoints
