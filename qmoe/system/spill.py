"""Tensors that arrive before it is known how large they become, on the way into safetensors files.

The header of such a file comes first although the sizes of encoded streams are only known at the
end, so tensors are spilled to a scratch file and put in order when the file is written. Bytes
depend on the tensors alone: largest items first (every tensor is aligned to its item size), then by
name; no time stamps.

Knows nothing about experts, models or manifests.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmoe.system.files import CHUNK, writing
from qmoe.system.tensors import DTYPE_NAMES, Streamed, tensor_bytes, write_tensors


@dataclass
class _Spilled:
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[tuple[int, int]]  # ranges of the scratch file
    digest: Any

    @property
    def nbytes(self) -> int:
        return sum(b - a for a, b in self.pieces)


class Spill:
    """Tensors of one part of a checkpoint, on the way to one or more safetensors files.

    A tensor arrives whole (`add`) or piece by piece (`append` on a 1-D uint8 tensor whose length
    is not known yet). Nothing stays in memory.
    """

    def __init__(self, path: Path) -> None:
        """Args: path: scratch file, created or emptied; removed by `close`."""
        self._path = path
        with writing(path):
            self._file = open(path, "w+b")  # noqa: SIM115 - lives until close()
        self._tensors: dict[str, _Spilled] = {}
        self._size = 0

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def add(self, name: str, tensor: Tensor) -> None:
        """Stores a whole tensor.

        Raises:
            ValueError: the name is taken or the dtype has no name in the format.
            OutputError: the disk refuses.
        """
        if name in self._tensors:
            raise ValueError(f"tensor {name} is written twice")
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"tensor {name}: dtype {tensor.dtype} cannot be stored")
        shape = tuple(tensor.shape)
        self._tensors[name] = _Spilled(tensor.dtype, shape, [], hashlib.sha256())
        self._write(name, tensor_bytes(tensor))

    def append(self, name: str, piece: Tensor) -> int:
        """Appends uint8 [n] to a growing 1-D tensor.

        Returns:
            Length before the piece.
        """
        if piece.dtype != torch.uint8 or piece.ndim != 1:
            raise ValueError(
                f"{name}: pieces are uint8 [n], got {piece.dtype} {tuple(piece.shape)}"
            )
        t = self._tensors.setdefault(name, _Spilled(torch.uint8, (0,), [], hashlib.sha256()))
        before = t.nbytes
        self._write(name, tensor_bytes(piece))
        t.shape = (t.nbytes,)
        return before

    def _write(self, name: str, data: memoryview) -> None:
        t = self._tensors[name]
        with writing(self._path):
            self._file.write(data)
        t.digest.update(data)
        end = self._size + data.nbytes
        if t.pieces and t.pieces[-1][1] == self._size:
            t.pieces[-1] = (t.pieces[-1][0], end)
        else:
            t.pieces.append((self._size, end))
        self._size = end

    def close(self) -> None:
        """Drops the scratch file."""
        with suppress(OSError):  # on a full disk the rest of the buffer, which nobody needs now
            self._file.close()
        self._path.unlink(missing_ok=True)

    def _order(self) -> list[str]:
        def key(name: str) -> tuple[int, str]:
            return -self._tensors[name].dtype.itemsize, name

        return sorted(self._tensors, key=key)

    def shards(self, max_bytes: int) -> list[list[str]]:
        """Names per file: in file order, a new file whenever the next tensor would exceed the
        bound."""
        out: list[list[str]] = [[]]
        size = 0
        for name in self._order():
            n = self._tensors[name].nbytes
            if out[-1] and size + n > max_bytes:
                out.append([])
                size = 0
            out[-1].append(name)
            size += n
        return out

    def write_shard(self, path: Path, names: list[str]) -> tuple[int, str, dict[str, str]]:
        """Writes one durable safetensors file.

        Returns:
            Its size, its sha256, and the sha256 of every tensor in it.
        """
        with writing(self._path):
            self._file.flush()
        chosen = {name: self._tensors[name] for name in names}
        size, digest = write_tensors(
            path,
            {n: Streamed(t.dtype, t.shape, partial(self._chunks, t)) for n, t in chosen.items()},
        )
        with writing(self._path):
            self._file.seek(0, os.SEEK_END)
        return size, digest, {name: t.digest.hexdigest() for name, t in chosen.items()}

    def _chunks(self, tensor: _Spilled) -> Iterator[bytes]:
        for begin, end in tensor.pieces:
            self._file.seek(begin)
            while begin < end:
                chunk = self._file.read(min(CHUNK, end - begin))
                begin += len(chunk)
                yield chunk
