"""``qmoe_manifest.json``: what a compressed checkpoint consists of, with a checksum for every byte
of it.

The file is canonical JSON (sorted keys, one space of indent, ASCII) with the key ``checksum``: the
sha256 of the file's own bytes with the 64 digits of that value replaced by zeros. Every other file
is listed with size and sha256, so that one flipped bit anywhere is found. Knows nothing about
models or streams.
"""

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qmoe.errors import CorruptError, FormatVersionError
from qmoe.store.claims import check_manifest
from qmoe.system.files import canonical_json, file_sha256, write_file

MANIFEST = "qmoe_manifest.json"
FORMAT_VERSION = 1
MAX_MANIFEST = 1 << 30
_ZEROS = "0" * 64


def check_version(found: Any, where: str) -> None:
    """Raises:
    FormatVersionError: with both versions and what to do.
    """
    if type(found) is not int or found != FORMAT_VERSION:
        raise FormatVersionError(
            f"{where} has format version {found!r}, this release reads version {FORMAT_VERSION}; "
            f"use the release of qmoe that wrote it, or compress again"
        )


def _sealed(document: dict[str, Any], checksum: str) -> bytes:
    return canonical_json({**document, "checksum": checksum})


def sealed(document: dict[str, Any]) -> bytes:
    """A document with its own checksum, as `read_sealed` wants it."""
    return _sealed(document, hashlib.sha256(_sealed(document, _ZEROS)).hexdigest())


def write_sealed(path: Path, document: dict[str, Any]) -> None:
    """Writes a document with its own checksum, durably.

    Raises:
        OutputError: the disk refuses.
    """
    write_file(path, sealed(document))


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads a document that `write_sealed` wrote and proves that not one bit of it changed.

    Raises:
        CorruptError: missing, unreadable, not canonical, or the checksum differs.
    """
    try:
        if path.stat().st_size > MAX_MANIFEST:
            raise CorruptError(f"{path} has {path.stat().st_size} bytes, more than any valid one")
        data = path.read_bytes()
    except FileNotFoundError as e:
        raise CorruptError(
            f"{path.parent} has no {path.name}; it is not a complete compressed checkpoint "
            f"(for a hub model, download the whole repository first: qmoe.load does)"
        ) from e
    except OSError as e:
        raise CorruptError(f"cannot read {path}: {e.strerror or e}") from e
    try:
        document = json.loads(data.decode("ascii"))
    except (ValueError, RecursionError) as e:  # a number of thousands of digits is a ValueError
        raise CorruptError(f"{path} is corrupt: not JSON: {e}") from e
    if not isinstance(document, dict) or not isinstance(document.get("checksum"), str):
        raise CorruptError(f"{path} is corrupt: it has no checksum")
    stored = document.pop("checksum")
    zeroed = data.replace(stored.encode("ascii", "replace"), _ZEROS.encode(), 1)
    if hashlib.sha256(zeroed).hexdigest() != stored:
        raise CorruptError(f"{path} is corrupt: its checksum is not {stored[:64]}")
    return document


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a compressed checkpoint, checksum, version and claims verified, every listed
    file present and of its size.

    Raises:
        CorruptError: with the file and both values.
        FormatVersionError: written in another format version.
    """
    path = directory / MANIFEST
    document = read_sealed(path)
    check_version(document.get("format_version"), str(path))
    check_manifest(document, str(path))
    for name, entry in document["files"].items():
        try:
            size = (directory / name).stat().st_size
        except OSError as e:
            raise CorruptError(
                f"{directory / name} is listed but cannot be read: {e.strerror}"
            ) from e
        if size != entry["bytes"]:
            raise CorruptError(f"{directory / name} has {size} bytes, expected {entry['bytes']}")
    for stray in sorted(p.name for p in directory.glob("qmoe*.safetensors*")):
        if stray not in document["files"]:
            raise CorruptError(f"{directory / stray} is not listed in {MANIFEST}")
    return document


def check_files(
    directory: Path, manifest: dict[str, Any], progress: Callable[[int], object] | None = None
) -> None:
    """Compares the sha256 of every listed file, several files at a time.

    Args:
        directory: the compressed checkpoint.
        manifest: from `read_manifest`.
        progress: called with the size of every file that was found sound.

    Raises:
        CorruptError: with the file and both checksums.
    """

    def one(item: tuple[str, dict[str, Any]]) -> tuple[str, str, str, int]:
        name, entry = item
        try:
            return name, entry["sha256"], file_sha256(directory / name), entry["bytes"]
        except OSError as e:
            raise CorruptError(f"cannot read {directory / name}: {e.strerror or e}") from e

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for name, expected, found, size in pool.map(one, sorted(manifest["files"].items())):
            if expected != found:
                raise CorruptError(
                    f"{directory / name} is corrupt: sha256 {found}, expected {expected}; "
                    f"copy it again from where it came from"
                )
            if progress is not None:
                progress(size)
