"""One weight file. Safetensors are read by position (no memory map), torch pickles through torch's
own memory map.

Reading by position keeps three promises that a map does not: the address space does not grow with
the file, resident memory is what was asked for, and a file that was replaced under a running job is
noticed at the next read.
"""

import hashlib
import json
import math
import os
import pickle
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmoe.errors import SourceError
from qmoe.source.selection import Selection, cut, leading
from qmoe.system.tensors import DTYPES

HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors format
EDGE = 4096  # bytes at the end of a file that enter its fingerprint


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: dtype, shape and, in a safetensors file, its absolute byte range."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0
    stop: int = 0


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


def parse_header(header: dict[str, Any], base: int, size: int, file: str) -> dict[str, Entry]:
    """Validate a safetensors header against the file.

    Args:
        header: the JSON object of the file.
        base: bytes before the tensors' data.
        size: bytes of the whole file.
        file: for messages.

    Raises:
        SourceError: an entry is malformed, ranges leave holes, overlap, disagree with the shape, or
            do not end at the file's end.
    """
    entries: dict[str, Entry] = {}
    for name, item in header.items():
        if name == "__metadata__":
            continue
        try:
            kind, shape, (start, stop) = (
                item["dtype"],
                tuple(map(int, item["shape"])),
                map(int, item["data_offsets"]),
            )
        except (TypeError, KeyError, ValueError) as e:
            raise SourceError(
                f"{file}: the header entry of {name!r} is malformed ({item!r}); download the file "
                "again"
            ) from e
        if kind not in DTYPES:
            raise SourceError(
                f"{file}: tensor {name!r} has dtype {kind}, which is not supported (known: "
                f"{', '.join(DTYPES)})"
            )
        need = math.prod(shape) * DTYPES[kind].itemsize
        if min((start, stop, *shape)) < 0 or stop - start != need:
            raise SourceError(
                f"{file}: tensor {name!r} {kind} {list(shape)} needs {need} bytes but its offsets "
                f"are {start}..{stop}; download the file again"
            )
        entries[name] = Entry(DTYPES[kind], shape, base + start, base + stop)
    end = base
    for name, entry in sorted(entries.items(), key=lambda i: (i[1].start, i[1].stop)):
        if entry.start != end:
            what = (
                "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            )
            raise SourceError(
                f"{file}: tensor {name!r} starts at byte {entry.start}, expected {end}: it "
                f"{what}; download the file again"
            )
        end = entry.stop
    if end != size:
        raise SourceError(
            f"{file} has {size} bytes but its header describes {end}: truncated or damaged; "
            "download the file again"
        )
    return entries


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

    def _open(self) -> int:
        try:
            return os.open(self.path(), os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as e:
            raise SourceError(
                f"cannot open the source file {self.name}: {e.strerror}; is the checkpoint "
                "complete?"
            ) from e

    def _load(self) -> None:
        fd = self._open()
        try:
            stat = os.fstat(fd)
            lead = os.pread(fd, 8, 0)
            n = int.from_bytes(lead, "little")
            if len(lead) < 8 or n > min(stat.st_size - 8, HEADER_LIMIT):
                raise SourceError(
                    f"{self.name} has {stat.st_size} bytes, which is no complete safetensors file "
                    f"(header of {n} bytes): "
                    "truncated or not downloaded (a git-lfs pointer?); download it again"
                )
            raw = _pread(fd, bytearray(n), 8, self.name)
            try:
                header = json.loads(bytes(raw))
            except ValueError as e:
                raise SourceError(
                    f"{self.name}: the safetensors header is no JSON ({e}); download the file again"
                ) from e
            if not isinstance(header, dict):
                raise SourceError(
                    f"{self.name}: the safetensors header is a {type(header).__name__}, not an "
                    "object; download it again"
                )
            entries = parse_header(header, 8 + n, stat.st_size, self.name)
            tail = min(EDGE, stat.st_size)
            end = _pread(fd, bytearray(tail), stat.st_size - tail, self.name)
            self._digest = hashlib.sha256(stat.st_size.to_bytes(8, "little") + raw + end).digest()
            self._identity = (stat.st_size, stat.st_mtime_ns)
            self._entries = entries
        finally:
            os.close(fd)

    def read(self, tensor: str, selection: Selection = ...) -> Tensor:
        entry = self.entries[tensor]
        start, stop, rest = leading(selection, entry.shape)
        shape = (stop - start, *entry.shape[1:])
        row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        data = torch.empty((stop - start) * row, dtype=torch.uint8)
        if data.numel():
            fd = self._open()
            try:
                stat = os.fstat(fd)
                if (stat.st_size, stat.st_mtime_ns) != self._identity:
                    raise SourceError(
                        f"{self.name} changed while it was being read (size, mtime "
                        f"{self._identity} before, "
                        f"{(stat.st_size, stat.st_mtime_ns)} now); keep the source as it is and "
                        "start again"
                    )
                _pread(fd, data.numpy(), entry.start + start * row, self.name)
            finally:
                os.close(fd)
        return cut(data.view(entry.dtype).view(shape), rest)

    def prefetch(self, tensor: str) -> None:
        entry = self.entries[tensor]
        if not hasattr(os, "posix_fadvise"):
            return
        fd = self._open()
        try:
            os.posix_fadvise(fd, entry.start, entry.stop - entry.start, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(fd)


def _pread(fd: int, into: Any, offset: int, file: str) -> Any:
    """Fill a buffer from a byte offset; the kernel may hand over at most 2 GiB at a time."""
    view = memoryview(into)
    done = 0
    while done < len(view):
        try:
            n = os.preadv(fd, [view[done : done + (1 << 30)]], offset + done)
        except OSError as e:
            raise SourceError(
                f"read error in {file} at byte {offset + done}: {e.strerror}; check the disk and "
                "run again"
            ) from e
        if n == 0:
            raise SourceError(
                f"{file} ends at byte {offset + done}, expected {offset + len(view)}: truncated; "
                "download it again"
            )
        done += n
    return into


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
            reason = str(e).strip().splitlines()[0][:200] if str(e).strip() else type(e).__name__
            raise SourceError(
                f"{self.name} cannot be read as torch weights ({reason}): truncated, damaged or "
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
        fd = os.open(self._path, os.O_RDONLY)
        try:  # a zip file ends with its directory, which holds a CRC-32 of every tensor
            tail = min(16 * EDGE, self.size)
            end = bytes(_pread(fd, bytearray(tail), self.size - tail, self.name))
        finally:
            os.close(fd)
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
