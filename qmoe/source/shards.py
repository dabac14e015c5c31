"""One weight file. Safetensors are read by position (no memory map), torch pickles through torch's
own memory map; a file that was replaced under a running job is noticed at the next read.
"""

import hashlib
import math
import os
import pickle
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from qmoe.errors import SourceError, reason
from qmoe.source.selection import Selection, cut, leading
from qmoe.system.tensors import Entry, header_of, opened, read_at

EDGE = 4096  # bytes at the end of a file that enter its fingerprint


class Shard(ABC):
    """A weight file: `name` for messages, `entries` by tensor name, `read`."""

    name: str

    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes of the file."""

    @property
    @abstractmethod
    def entries(self) -> Mapping[str, Entry]:
        """Tensors of the file; reads the header once."""

    @abstractmethod
    def read(self, tensor: str, selection: Selection = ...) -> Tensor:
        """A copy of the tensor or of the selected part, in the file's dtype, on the CPU."""

    def prefetch(self, tensor: str) -> None:  # noqa: B027 - a hint that a kind of file may ignore
        """Start bringing a tensor's bytes closer, without waiting and without errors."""

    @abstractmethod
    def digest(self) -> bytes:
        """sha256 of what identifies the file's contents cheaply: size, header, last bytes."""


class SafetensorsShard(Shard):
    """A local safetensors file. Opened for every read, so that hundreds of shards need no open
    files.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._entries: dict[str, Entry] | None = None
        self._identity: tuple[int, int] = (0, 0)
        self._digest = b""
        self._start = 0  # of the data

    def path(self) -> Path:
        """The local file."""
        return self._path

    @property
    def size(self) -> int:
        if self._entries is None:
            self._load()
        return self._identity[0]

    @property
    def entries(self) -> Mapping[str, Entry]:
        if self._entries is None:
            self._load()
        assert self._entries is not None
        return self._entries

    def digest(self) -> bytes:
        if self._entries is None:
            self._load()
        return self._digest

    def _open(self) -> AbstractContextManager[int]:
        return opened(self.path(), SourceError, f"the source file {self.name}")

    def _load(self) -> None:
        with self._open() as fd:
            stat = os.fstat(fd)
            text, self._entries = header_of(fd, self.name, SourceError)
            tail = min(EDGE, stat.st_size)
            end = read_at(fd, bytearray(tail), stat.st_size - tail, self.name, SourceError)
            self._digest = hashlib.sha256(stat.st_size.to_bytes(8, "little") + text + end).digest()
            self._identity = (stat.st_size, stat.st_mtime_ns)
            self._start = 8 + len(text)

    def read(self, tensor: str, selection: Selection = ...) -> Tensor:
        entry = self.entries[tensor]
        start, stop, rest = leading(selection, entry.shape)
        shape = (stop - start, *entry.shape[1:])
        row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        data = torch.empty((stop - start) * row, dtype=torch.uint8)
        if data.numel():
            with self._open() as fd:
                stat = os.fstat(fd)
                if (stat.st_size, stat.st_mtime_ns) != self._identity:
                    raise SourceError(
                        f"{self.name} changed while it was being read (size, mtime "
                        f"{self._identity} before, "
                        f"{(stat.st_size, stat.st_mtime_ns)} now); keep the source as it is and "
                        "start again"
                    )
                at = self._start + entry.begin + start * row
                read_at(fd, data.numpy(), at, self.name, SourceError)
        return cut(data.view(entry.dtype).view(shape), rest)

    def prefetch(self, tensor: str) -> None:
        entry = self.entries[tensor]
        if not hasattr(os, "posix_fadvise"):
            return
        at, size = self._start + entry.begin, entry.end - entry.begin
        with self._open() as fd:
            os.posix_fadvise(fd, at, size, os.POSIX_FADV_WILLNEED)


class TorchShard(Shard):
    """A local ``pytorch_model*.bin``: unpickled with ``weights_only=True``, tensors mapped from the
    zip file.

    Files in torch's format from before 1.6 (no zip) cannot be mapped and are read whole when first
    used.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._state: dict[str, Tensor] | None = None
        self._entries: dict[str, Entry] | None = None
        self._identity: tuple[int, int] = (0, 0)

    @property
    def size(self) -> int:
        try:
            return self._path.stat().st_size
        except OSError as e:
            raise SourceError(
                f"cannot open the source file {self.name}: {e.strerror}; is the checkpoint "
                "complete?"
            ) from e

    def _load(self) -> dict[str, Tensor]:
        if self._state is not None:
            return self._state
        size = self.size
        identity = (size, self._path.stat().st_mtime_ns)
        if self._entries is not None and identity != self._identity:
            raise SourceError(
                f"{self.name} changed while it was being read (size, mtime {self._identity} "
                f"before, {identity} now); "
                "keep the source as it is and start again"
            )
        try:
            state = torch.load(
                self._path,
                map_location="cpu",
                weights_only=True,
                mmap=zipfile.is_zipfile(self._path),
            )
        except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as e:
            raise SourceError(
                f"{self.name} cannot be read as torch weights ({reason(e)}): truncated, damaged or "
                "unsafe"
            ) from e
        if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
            raise SourceError(
                f"{self.name} holds more than tensors by name; save the model's state_dict alone"
            )
        self._identity, self._state = identity, state
        self._entries = {k: Entry(v.dtype, tuple(v.shape)) for k, v in state.items()}
        return state

    @property
    def entries(self) -> Mapping[str, Entry]:
        if self._entries is None:
            self._load()
        assert self._entries is not None
        return self._entries

    def digest(self) -> bytes:
        entries = sorted((k, str(e.dtype), e.shape) for k, e in self.entries.items())
        tail = min(16 * EDGE, self.size)
        with opened(self._path, SourceError, f"the source file {self.name}") as fd:
            # a zip file ends with its directory, which holds a CRC-32 of every tensor
            end = bytes(read_at(fd, bytearray(tail), self.size - tail, self.name, SourceError))
        return hashlib.sha256(
            self.size.to_bytes(8, "little") + repr(entries).encode() + end
        ).digest()

    def read(self, tensor: str, selection: Selection = ...) -> Tensor:
        value = self._load()[tensor]
        start, stop, rest = leading(selection, tuple(value.shape))
        rows = value[None] if not value.shape else value[start:stop]
        return cut(rows.clone(memory_format=torch.contiguous_format), rest)

    def close(self) -> None:
        """Drop the memory map; the next read maps the file again."""
        self._state = None
