"""Durable small files, directories that appear complete or not at all, checksums, and what a full
disk or a missing permission is called.

Knows nothing about what the files hold.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
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


def partial_of(out: Path) -> Path:
    """Where a compression that writes `out` keeps what is finished, for the run that resumes it."""
    return out.with_name(out.name + ".partial")


def check_vacant(out: Path) -> None:
    """Raises:
    OutputError: `out` exists and is no empty directory.
    """
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} already exists; choose another output directory or remove it")


def check_no_partial(out: Path) -> None:
    """Raises:
    OutputError: a compression of the same output is unfinished; nothing else may take its place.
    """
    if partial_of(out).exists():
        raise OutputError(
            f"{partial_of(out)} holds an unfinished compression to {out}; finish it with the same "
            "command, remove it, or choose another output directory"
        )


def take_lock(folder: Path, out: Path) -> int:
    """Locks a folder in which `out` is made, for as long as the descriptor is open.

    Returns:
        The descriptor.

    Raises:
        OutputError: another process has the lock, or the disk refuses.
    """
    path = folder / "lock"
    with writing(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        os.close(fd)
        raise OutputError(f"another run is writing {out}; wait for it or stop it") from e
    return fd


@contextmanager
def staged(out: Path, what: str) -> Iterator[Path]:
    """A folder in which a directory is made that appears under its name when the context ends, and
    is gone if it ends by an exception. What a process that was killed left is removed.

    Args:
        out: the directory; it must not exist, or be empty.
        what: ending of the folder's name, such as "export".

    Raises:
        OutputError: `out` exists, is being made by another process, is the output of an unfinished
            compression, or the disk refuses.
    """
    check_vacant(out)
    check_no_partial(out)
    root = out.with_name(f"{out.name}.{what}")
    if root.exists() and not (root / "lock").is_file():
        raise OutputError(f"{root} is in the way of {out}; move it, or choose another directory")
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
    lock = take_lock(root, out)
    try:
        data = root / "data"
        with writing(root):
            if data.exists():
                shutil.rmtree(data)
            data.mkdir()
        yield data
        check_vacant(out)
        with writing(out):
            os.rename(data, out)
            sync_directory(out.parent)
    finally:
        shutil.rmtree(root, ignore_errors=True)
        os.close(lock)


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
