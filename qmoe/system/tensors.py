"""Files of tensors in the safetensors layout: the one reader, which trusts nothing, and the one
writer.

A file is ``u64 header length | JSON header | data``; the header names every tensor's dtype, shape
and byte range in the data. Files are read by position, not mapped: the address space does not grow
with the file, and resident memory is what was asked for. Who reads says what kind of error a
damaged file is: of a source or of a compressed checkpoint.

Knows nothing about experts, models or manifests.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmoe.errors import CorruptError, QmoeError
from qmoe.system.files import sync_directory, writing

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_MAX_BYTES = 1 << 63  # of a tensor; torch counts in int64
_MAX_DIMS = 64
_AT_ONCE = 1 << 30  # bytes of one read; the kernel hands over at most 2 GiB

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
    """One tensor of a file.

    Attributes:
        dtype, shape: of the tensor.
        begin, end: its byte range in the data part of a safetensors file; 0 in other files.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int = 0
    end: int = 0


# ---- writing ----


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's elements in row-major order as bytes (little-endian hosts only, as torch itself
    assumes)."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


@dataclass(frozen=True)
class Streamed:
    """A tensor on the way into a file.

    Attributes:
        dtype, shape: of the tensor; the dtype has a name in the format.
        chunks: called once, yields its bytes in order, in pieces of any size.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes | memoryview]]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, tensors: Mapping[str, Streamed]) -> tuple[int, str]:
    """Writes a durable safetensors file that is there complete or not at all.

    Bytes depend on the tensors and their order alone. A tensor is aligned to its item size if those
    of larger items come first; the header is padded to 8 bytes.

    Args:
        path: of the file; ``path.tmp`` is used on the way.
        tensors: in the order of the file.

    Returns:
        Size and sha256 of the file.

    Raises:
        ValueError: a tensor yields more or fewer bytes than its shape has.
        OutputError: the disk refuses.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, t in tensors.items():
        offsets = [at, at + t.nbytes]
        header[name] = {
            "dtype": DTYPE_NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": offsets,
        }
        at += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    scratch = path.with_name(path.name + ".tmp")
    with writing(path):
        with open(scratch, "wb") as f:
            for chunk in _file_chunks(text, tensors):
                f.write(chunk)
                digest.update(chunk)
            f.flush()
            os.fsync(f.fileno())
        os.replace(scratch, path)
        sync_directory(path.parent)
    return 8 + len(text) + at, digest.hexdigest()


def _file_chunks(header: bytes, tensors: Mapping[str, Streamed]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little") + header
    for name, t in tensors.items():
        written = 0
        for chunk in t.chunks():
            written += memoryview(chunk).nbytes
            yield chunk
        if written != t.nbytes:
            raise ValueError(f"{name}: {written} bytes came, {list(t.shape)} has {t.nbytes}")


# ---- reading ----


@contextmanager
def opened(path: Path, error: type[QmoeError], where: str = "") -> Iterator[int]:
    """A descriptor for reading by position.

    Args:
        path: of the file.
        error: raised if it cannot be opened.
        where: name of the file for messages, by default its path.
    """
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as e:
        raise error(f"cannot open {where or path}: {e.strerror}; is the directory complete?") from e
    try:
        yield fd
    finally:
        os.close(fd)


def read_at(fd: int, into: Any, offset: int, where: str, error: type[QmoeError]) -> Any:
    """Fills a buffer from a byte offset and returns it.

    Args:
        fd: an open file.
        into: a writable buffer.
        offset: of its first byte in the file.
        where: name of the file for messages.
        error: raised if the file ends before, or the disk fails.
    """
    view = memoryview(into)
    done = 0
    while done < len(view):
        try:
            n = os.preadv(fd, [view[done : done + _AT_ONCE]], offset + done)
        except OSError as e:
            raise error(
                f"read error in {where} at byte {offset + done}: {e.strerror}; check the disk and "
                "run again"
            ) from e
        if n == 0:
            raise error(
                f"{where} ends at byte {offset + done}, expected {offset + len(view)}: truncated; "
                "fetch it again"
            )
        done += n
    return into


def header_of(fd: int, where: str, error: type[QmoeError]) -> tuple[bytes, dict[str, Entry]]:
    """Reads and validates the header of an open safetensors file; allocates nothing that the file's
    real size does not allow.

    Args:
        fd: the file.
        where: its name for messages.
        error: what a damaged file is.

    Returns:
        The header's bytes, which begin at byte 8 and end where the data begins; and the tensors in
        the order of the data.
    """
    size = os.fstat(fd).st_size
    lead = read_at(fd, bytearray(min(8, size)), 0, where, error)
    length = int.from_bytes(lead, "little")
    if size < 8 or length > min(MAX_HEADER, size - 8):
        raise error(
            f"{where} has {size} bytes, which is no complete safetensors file (header of {length} "
            "bytes): truncated or not downloaded (a git-lfs pointer?); fetch it again"
        )
    text = bytes(read_at(fd, bytearray(length), 8, where, error))
    try:
        header = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as e:  # a number of thousands of digits is a ValueError
        raise error(f"{where}: the header is no JSON ({e}); fetch the file again") from e
    return text, check_header(header, size - 8 - length, where, error)


def check_header(header: Any, data: int, where: str, error: type[QmoeError]) -> dict[str, Entry]:
    """Validates a header that is parsed.

    Args:
        header: the JSON value.
        data: bytes of the file behind the header.
        where: name of the file for messages.
        error: raised for an entry that is malformed, and for ranges that leave holes, overlap,
            disagree with the shape, or do not end with the data.

    Returns:
        The tensors in the order of the data.
    """
    if not isinstance(header, dict):
        raise error(f"{where}: the header is a {type(header).__name__}, not an object")
    found = {
        name: _entry(name, raw, where, error)
        for name, raw in header.items()
        if name != "__metadata__"
    }
    entries = dict(sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)))
    at = 0
    for name, entry in entries.items():
        if entry.begin != at:
            what = (
                "overlaps the tensor before it" if entry.begin < at else "leaves a hole before it"
            )
            raise error(
                f"{where}: tensor {name!r} begins at byte {entry.begin}, expected {at}: it {what}; "
                "fetch the file again"
            )
        at = entry.end
    if at != data:
        raise error(
            f"{where} has {data} bytes of data but its header describes {at}: truncated or "
            "damaged; fetch it again"
        )
    return entries


def _entry(name: str, raw: Any, where: str, error: type[QmoeError]) -> Entry:
    try:
        kind, shape, (begin, end) = raw["dtype"], raw["shape"], raw["data_offsets"]
        numbers = [begin, end, *shape]
    except (KeyError, TypeError, ValueError):
        numbers = [None]
    if (
        any(type(n) is not int or not 0 <= n < _MAX_BYTES for n in numbers)
        or not isinstance(shape, list)
        or not isinstance(kind, str)
        or len(shape) > _MAX_DIMS
    ):
        text = f"{where}: the header entry of {name!r} is malformed ({raw!r:.200}); fetch it again"
        raise error(text)
    if kind not in DTYPES:
        raise error(
            f"{where}: tensor {name!r} has dtype {kind[:20]!r}, which is not supported (known: "
            f"{', '.join(DTYPES)})"
        )
    dtype, need = DTYPES[kind], prod(shape) * DTYPES[kind].itemsize
    if end - begin != need or prod(max(n, 1) for n in shape) * dtype.itemsize >= _MAX_BYTES:
        raise error(
            f"{where}: tensor {name!r} {kind} {shape} needs {need} bytes but its offsets are "
            f"{begin}..{end}; fetch the file again"
        )
    return Entry(dtype, tuple(shape), begin, end)


def read_header(path: Path, error: type[QmoeError] = CorruptError) -> tuple[int, dict[str, Entry]]:
    """Offset of the data part in a safetensors file, and its tensors in the order of the data; see
    `header_of`."""
    with opened(path, error) as fd:
        text, entries = header_of(fd, str(path), error)
    return 8 + len(text), entries


def read_tensor(
    path: Path, data_start: int, entry: Entry, error: type[QmoeError] = CorruptError
) -> Tensor:
    """Reads one tensor into memory of its own.

    Args:
        path, data_start, entry: file, and what `read_header` found in it.
        error: raised if the file is shorter than its header says.
    """
    out = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
    with opened(path, error) as fd:
        read_at(fd, out.numpy(), data_start + entry.begin, str(path), error)
    return out.view(entry.dtype).reshape(entry.shape)
