"""Files of tensors (the safetensors layout) written as a stream and read without trust.

A safetensors file is ``u64 header length | JSON header | data``; the header names every tensor's
dtype, shape and byte range. The library's writer wants all tensors in memory, and its header comes
first although the sizes of encoded streams are only known at the end, so tensors are spilled to a
scratch file and put in order when the file is closed. Bytes depend on the tensors alone: largest
items first (every tensor is aligned to its item size), then by name; no time stamps.

Knows nothing about experts, models or manifests.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmoe.errors import CorruptError
from qmoe.system.files import CHUNK, sync_directory, writing

MAX_HEADER = 100 << 20  # the limit of the safetensors library

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
DTYPE_NAMES = {v: k for k, v in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: dtype name, shape, byte range in the data part of its file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


# ---- writing ----


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's elements in row-major order as bytes (little-endian hosts only, as torch itself
    assumes)."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


@dataclass
class _Spilled:
    dtype: str
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
        self._tensors[name] = _Spilled(
            DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), [], hashlib.sha256()
        )
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
        t = self._tensors.setdefault(name, _Spilled("U8", (0,), [], hashlib.sha256()))
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
            return -DTYPES[self._tensors[name].dtype].itemsize, name

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
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in names:
            t = self._tensors[name]
            offsets = [at, at + t.nbytes]
            header[name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": offsets}
            at += t.nbytes
        text = json.dumps(header, separators=(",", ":")).encode("ascii")
        text += b" " * (-len(text) % 8)
        digest = hashlib.sha256()
        scratch = path.with_name(path.name + ".tmp")
        with writing(path):
            with open(scratch, "wb") as f:
                for chunk in self._chunks(text, names):
                    f.write(chunk)
                    digest.update(chunk)
                f.flush()
                os.fsync(f.fileno())
            os.replace(scratch, path)
            sync_directory(path.parent)
        sums = {name: self._tensors[name].digest.hexdigest() for name in names}
        return 8 + len(text) + at, digest.hexdigest(), sums

    def _chunks(self, header: bytes, names: list[str]) -> Iterator[bytes]:
        yield len(header).to_bytes(8, "little") + header
        self._file.flush()
        for name in names:
            for begin, end in self._tensors[name].pieces:
                self._file.seek(begin)
                while begin < end:
                    chunk = self._file.read(min(CHUNK, end - begin))
                    begin += len(chunk)
                    yield chunk
        self._file.seek(0, os.SEEK_END)


# ---- reading ----


def read_header(path: Path) -> tuple[int, dict[str, Entry]]:
    """Parses and validates the header of a safetensors file; allocates nothing that the file's
    real size does not allow.

    Returns:
        Offset of the data part in the file, and the tensors in file order.

    Raises:
        CorruptError: with the file, the tensor and the offending values.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise CorruptError(f"{path}: header of {length} bytes in a file of {size} bytes")
            text = f.read(length)
    except OSError as e:
        raise CorruptError(f"cannot read {path}: {e.strerror or e}") from e
    try:
        header = json.loads(text.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise CorruptError(f"{path}: the header is not JSON: {e}") from e
    if not isinstance(header, dict):
        raise CorruptError(f"{path}: the header is a {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    entries: dict[str, Entry] = {}
    at = 0
    for name, raw in sorted(header.items(), key=_begin):
        entry = _entry(path, name, raw)
        if entry.begin != at:
            raise CorruptError(f"{path}: tensor {name} begins at {entry.begin}, expected {at}")
        entries[name] = entry
        at = entry.end
    if at != size - 8 - length:
        raise CorruptError(f"{path}: tensors end at {at}, the data has {size - 8 - length} bytes")
    return 8 + length, entries


def _begin(item: tuple[str, Any]) -> int:
    try:
        return int(item[1]["data_offsets"][0])
    except (KeyError, TypeError, IndexError, ValueError):
        return -1  # sorts first and fails in _entry, which can say why


def _entry(path: Path, name: str, raw: Any) -> Entry:
    try:
        dtype, shape, (begin, end) = raw["dtype"], raw["shape"], raw["data_offsets"]
    except (KeyError, TypeError, ValueError) as e:
        raise CorruptError(f"{path}: the header entry of {name} is {raw!r}") from e
    numbers = [begin, end, *(shape if isinstance(shape, list) else [None])]
    if dtype not in DTYPES or any(type(v) is not int or v < 0 for v in numbers):
        raise CorruptError(f"{path}: the header entry of {name} is {raw!r}")
    if end - begin != prod(shape) * DTYPES[dtype].itemsize:
        raise CorruptError(f"{path}: {name} {dtype} {shape} does not fill bytes {begin} to {end}")
    return Entry(dtype, tuple(shape), begin, end)


def read_tensor(path: Path, data_start: int, entry: Entry) -> Tensor:
    """Reads one tensor into memory of its own.

    Raises:
        CorruptError: the file is shorter than its header says.
    """
    out = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
    try:
        with open(path, "rb", buffering=0) as f:
            f.seek(data_start + entry.begin)
            view, got = out.numpy().data, 0
            while got < len(view) and (n := f.readinto(view[got:])):
                got += n
    except OSError as e:
        raise CorruptError(f"cannot read {path}: {e.strerror or e}") from e
    if got < len(out):
        raise CorruptError(f"{path} is truncated: {got} bytes where {len(out)} were announced")
    return out.view(DTYPES[entry.dtype]).reshape(entry.shape)
