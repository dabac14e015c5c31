"""Durable small files, checksums, and what a full disk or a missing permission is called.

Knows nothing about what the files hold.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qmoe.errors import OutputError

CHUNK = 8 << 20  # bytes read or written at a time


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the operating system says about a failed write into one sentence.

    Raises:
        OutputError: no space, no permission, a name that is taken, or any other failure of a file
            operation.
    """
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"no space left while writing {path}; free some and run the same command again"
            ) from e
        if e.errno == errno.EFBIG:
            raise OutputError(
                f"{path} would exceed the file size limit of this process or disk"
            ) from e
        if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(
                f"no permission to write {path}; choose another output directory"
            ) from e
        raise OutputError(f"cannot write {path}: {e.strerror or e}") from e


def sync_directory(path: Path) -> None:
    """Makes renames and new names in a directory durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes) -> None:
    """Writes a small file so that after a crash it is either absent, the old one, or complete."""
    with writing(path):
        scratch = path.with_name(path.name + ".tmp")
        with open(scratch, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(scratch, path)
        sync_directory(path.parent)


def canonical_json(value: Any) -> bytes:
    """The one serialisation of a JSON value that files of this format use: sorted keys, indent 1,
    ASCII, no NaN."""
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as f:
        while chunk := f.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
