"""What each block returned, kept so that the next block, or the next run, starts there.

`Resident` keeps them in an `ActivationStore` and forgets them with the process. `Durable` keeps
them in files, one for each batch, so that an interrupted run goes on at the next block; a file
carries its own sha256, hence a torn or damaged one is noticed and never used. Files are read back
one batch at a time, so resident memory does not grow with the calibration set.

Knows nothing about models beyond the names of blocks.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qmoe.calib.activations import ActivationStore
from qmoe.errors import CorruptError
from qmoe.system.files import CHUNK, sync_directory, writing
from qmoe.system.tensors import DTYPE_NAMES, DTYPES, tensor_bytes

_DIGEST = 32  # bytes of the sha256 at the end of a file


class Outputs(Protocol):
    """Where a walk keeps what its blocks returned: a tensor, or tuples and lists of tensors."""

    def put(self, list_name: str, block: str, batch: int, value: Any) -> None:
        """Keeps a block's output for one batch; a copy is taken."""

    def get(self, list_name: str, block: str, batch: int) -> Any:
        """The output of `block`, the last finished one of its list, for one batch."""


class Resident:
    """Outputs in an `ActivationStore`, only the latest of every list."""

    def __init__(self, store: ActivationStore) -> None:
        self._store = store
        self._kept: dict[tuple[str, int], Any] = {}

    def put(self, list_name: str, block: str, batch: int, value: Any) -> None:
        """See `Outputs`."""
        old = self._kept.get((list_name, batch))
        self._kept[list_name, batch] = tree(self._store.keep, value)
        tree(self._store.release, old)

    def get(self, list_name: str, block: str, batch: int) -> Any:
        """See `Outputs`."""
        return self._kept[list_name, batch]

    def drop(self) -> None:
        """Forgets everything."""
        for value in self._kept.values():
            tree(self._store.release, value)
        self._kept.clear()


class Durable:
    """Outputs in ``folder/<block>/<batch>``, each file flushed to the disk before `put` returns.

    File: JSON header line ``{"of", "tree", "tensors": [[dtype, shape], ...]}``, the tensors' bytes,
    sha256 of all before it.
    """

    def __init__(self, folder: Path, run: str) -> None:
        """Args: folder: made if absent. run: identity of the run and stream; files of another one
        are not sound.
        """
        self._folder, self._run = folder, run
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def _path(self, block: str, batch: int) -> Path:
        return self._folder / re.sub(r"[^A-Za-z0-9._-]", "_", block) / str(batch)

    def put(self, list_name: str, block: str, batch: int, value: Any) -> None:
        """See `Outputs`.

        Raises:
            OutputError: the disk refuses.
        """
        path = self._path(block, batch)
        tensors: list[Tensor] = []
        shape = _describe(value, tensors)
        header = {
            "of": [self._run, block, batch],
            "tree": shape,
            "tensors": [[DTYPE_NAMES[t.dtype], list(t.shape)] for t in tensors],
        }
        digest = hashlib.sha256()
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            with open(path, "wb") as f:
                line = json.dumps(header).encode("ascii")
                parts: list[bytes | memoryview] = [line + b"\n", *map(tensor_bytes, tensors)]
                for data in parts:
                    f.write(data)
                    digest.update(data)
                f.write(digest.digest())
                f.flush()
                os.fsync(f.fileno())

    def get(self, list_name: str, block: str, batch: int) -> Any:
        """See `Outputs`.

        Raises:
            CorruptError: the file is not there or was changed.
        """
        path = self._path(block, batch)
        try:
            with open(path, "rb", buffering=0) as f:
                header = json.loads(_line(f))
                tensors = [_read(f, DTYPES[d], shape) for d, shape in header["tensors"]]
        except (OSError, ValueError, KeyError, EOFError) as e:
            raise CorruptError(
                f"cannot read the activations in {path} ({e}); run the same command again, it "
                "goes back as far as it must"
            ) from e
        return _build(header["tree"], tensors)

    def sound(self, block: str, batches: Sequence[int]) -> bool:
        """Whether the files of a finished block are all there and undamaged; reads them."""
        return all(self._sound(block, n) for n in batches)

    def _sound(self, block: str, batch: int) -> bool:
        digest = hashlib.sha256()
        try:
            with open(self._path(block, batch), "rb") as f:
                left = os.fstat(f.fileno()).st_size - _DIGEST
                line = f.readline()
                if json.loads(line)["of"] != [self._run, block, batch]:
                    return False
                digest.update(line)
                left -= len(line)
                while left > 0 and (chunk := f.read(min(CHUNK, left))):
                    digest.update(chunk)
                    left -= len(chunk)
                return left == 0 and f.read() == digest.digest()
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def settle(self) -> None:
        """Makes the names of the files durable, after the last `put` of a block."""
        with writing(self._folder):
            for path in self._folder.iterdir():
                sync_directory(path)
            sync_directory(self._folder)

    def keep_only(self, blocks: Sequence[str]) -> None:
        """Removes the files of all other blocks."""
        kept = {self._path(block, 0).parent.name for block in blocks}
        for path in self._folder.iterdir():
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)


class Sound(Protocol):
    """What can say whether the activations of a block are there."""

    def sound(self, block: str, batches: Sequence[int]) -> bool:
        """See `Durable.sound`."""


class Known:
    """Activations of one stream on several machines, of which each has seen to its own."""

    def __init__(self, blocks: set[str]) -> None:
        """Args: blocks: of which every machine has its share."""
        self._blocks = blocks

    def sound(self, block: str, batches: Sequence[int]) -> bool:
        """See `Durable.sound`."""
        return block in self._blocks


def resume_point(
    blocks: Sequence[tuple[str, str]],
    finished: Mapping[str, Any],
    streams: Sequence[Sound],
    batches: int,
) -> tuple[int, int]:
    """Where an interrupted run goes on.

    Args:
        blocks: (list name, block name) of all blocks in the order of the model.
        finished: names of blocks whose results are durable.
        streams: activations of every stream.
        batches: number of batches.

    Returns:
        (blocks that are done and whose activations are there, blocks that are done): the first is
        smaller only if activations are lost, and then the blocks between are made again.
    """
    done = 0
    while done < len(blocks) and blocks[done][1] in finished:
        done += 1
    sound: dict[str, bool] = {}
    for count in range(done, -1, -1):
        # what comes next starts from the last finished block of its list, and of the lists before
        need = set(dict(blocks[:count]).values())
        for name in need - sound.keys():
            sound[name] = all(s.sound(name, range(batches)) for s in streams)
        if all(sound[name] for name in need):
            return count, done
    raise AssertionError("nothing is needed to begin at the first block")


def tree(f: Callable[[Tensor], Any], value: Any) -> Any:
    """Applies `f` to every tensor of nested tuples and lists."""
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, tuple | list):
        return type(value)(tree(f, v) for v in value)
    return value


def _describe(value: Any, tensors: list[Tensor]) -> Any:
    """JSON for the shape of a tree; its tensors are appended to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_describe(v, tensors) for v in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"a block returned a {type(value).__name__}, which cannot be kept")


def _build(shape: dict[str, Any], tensors: list[Tensor]) -> Any:
    ((kind, inside),) = shape.items()
    if kind == "tensor":
        return tensors[inside]
    if kind == "value":
        return inside
    parts = [_build(v, tensors) for v in inside]
    return tuple(parts) if kind == "tuple" else parts


def _line(f: Any) -> bytes:
    """The header line of an unbuffered file; leaves the position behind it."""
    text = bytearray()
    while not text.endswith(b"\n"):
        piece = f.read(4096)
        if not piece:
            raise EOFError("no header")
        text += piece
        if b"\n" in piece:
            end = text.index(b"\n") + 1
            f.seek(end)
            return bytes(text[:end])
    return bytes(text)


def _read(f: Any, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    out = torch.empty(torch.Size(shape), dtype=dtype)
    view = tensor_bytes(out)
    got = 0
    while got < view.nbytes:
        n = f.readinto(view[got:])
        if not n:
            raise EOFError(f"{view.nbytes - got} bytes are missing")
        got += n
    return out
