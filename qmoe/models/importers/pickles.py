"""Training checkpoints as torch pickles: opened without running code, tensors mapped, not read.

torch's restricted unpickler builds tensors and plain containers. What else training programs keep
in their files is of three kinds: values of numpy, which are rebuilt here; classes of the program
itself (enumerations among the settings, loss scalers), which become `Opaque` objects that hold what
was stored and do nothing; and names of the standard library, of which only those of settings and
paths are taken.
"""

import sys
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qmoe.errors import SourceError, reason

NUMPY_TYPES = [type(np.dtype(c)) for c in "?bBhHiIlLqQefdFDSU"]


class Opaque:
    """An object of a class that is not imported: its name and what it was made of."""

    kind = ""
    state: Any = None

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __new__(cls, *values: Any) -> "Opaque":
        made = super().__new__(cls)
        made.values = values
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"{self.kind}({', '.join(map(repr, self.values))})"


def load_pickle(path: Path) -> dict[str, Any]:
    """A dictionary saved with ``torch.save``.

    Args:
        path: the file.

    Returns:
        The dictionary; objects of unknown classes in it are `Opaque`.

    Raises:
        SourceError: missing, damaged, no dictionary, or it names parts of the standard library that
            could run code.
    """
    try:
        mapped = zipfile.is_zipfile(path)
        with torch.serialization.safe_globals(_known()):
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if mapped else []
            with torch.serialization.safe_globals([_opaque(name, path) for name in unknown]):
                value = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except SourceError:
        raise
    # an unpickler fed with damaged bytes may raise anything
    except Exception as e:
        raise SourceError(
            f"{path} cannot be read as a torch checkpoint ({reason(e)}): missing, damaged, or with "
            "objects that run code"
        ) from e
    if not isinstance(value, dict):
        raise SourceError(f"{path} holds a {type(value).__name__}, expected a dictionary")
    return value


def settings_of(value: Any) -> dict[str, Any]:
    """The values of a Namespace, a dictionary or an object of the program itself, empty for
    anything else; numpy's scalars as Python's, and members of the program's enumerations of strings
    as these strings.
    """
    if isinstance(value, Opaque):
        value = value.state
    elif isinstance(value, Namespace):
        value = vars(value)
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else {}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Opaque) and len(value.values) == 1 and isinstance(value.values[0], str):
        return value.values[0]
    return value


def _known() -> list[Any]:
    """What may be built in addition to tensors, under the names of both generations of numpy."""
    numpy = [
        (function, f"{module}.{name}")
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for function, name in ((_array, "_reconstruct"), (_scalar, "scalar"))
    ]
    plain = [Namespace, np.ndarray, np.dtype, *NUMPY_TYPES]
    return [*plain, *numpy, (_text, "_codecs.encode"), (Opaque, "pathlib.PosixPath")]


def _opaque(name: str, path: Path) -> tuple[type[Opaque], str]:
    """A class of `Opaque` objects that stands for the class of that name."""
    top = name.split(".")[0]
    if top in sys.stdlib_module_names or top in ("torch", "numpy"):
        raise SourceError(
            f"{path} names {name}, which no checkpoint of weights needs and which could run code; "
            "it is not opened"
        )
    return type("Opaque", (Opaque,), {"kind": name}), name


def _array(kind: Any, shape: tuple[int, ...], letter: bytes) -> Any:
    """numpy's empty array, which the pickle then fills."""
    return np.ndarray((0,), np.uint8)


def _scalar(dtype: Any, data: Any) -> Any:
    """One number from its bytes; nothing of other kinds is built."""
    if not isinstance(dtype, np.dtype) or dtype.hasobject or not isinstance(data, bytes):
        raise ValueError(f"a numpy scalar of {dtype!r}")
    return np.frombuffer(data, dtype)[0]


def _text(text: str, encoding: str) -> bytes:
    """How old pickle protocols store bytes."""
    if encoding != "latin1":
        raise ValueError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")
