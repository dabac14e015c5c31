"""Training checkpoints as torch pickles: opened without running code, tensors mapped, not read."""

import pickle
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from qmoe.errors import SourceError, reason


def load_pickle(path: Path) -> dict[str, Any]:
    """A dictionary saved with ``torch.save``; of classes, only argparse.Namespace is allowed in it.

    Raises:
        SourceError: missing, damaged, no dictionary, or it holds objects that would run code.
    """
    try:
        with torch.serialization.safe_globals([Namespace]):
            value = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as e:
        raise SourceError(
            f"{path} cannot be read as a torch checkpoint ({reason(e)}): missing, damaged, or with "
            "objects that run code"
        ) from e
    if not isinstance(value, dict):
        raise SourceError(f"{path} holds a {type(value).__name__}, expected a dictionary")
    return value


def settings_of(value: Any) -> dict[str, Any]:
    """The values of a Namespace or a dictionary; empty for None."""
    if value is None:
        return {}
    return dict(vars(value)) if isinstance(value, Namespace) else dict(value)
