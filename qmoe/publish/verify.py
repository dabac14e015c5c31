"""``qmoe verify``: is a compressed checkpoint sound to the last bit and the last symbol?

Knows nothing about running a model.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qmoe import codec
from qmoe.errors import CorruptError
from qmoe.inference.structure import check
from qmoe.store.reader import Container
from qmoe.store.stored_experts import StoredExperts
from qmoe.system.tensors import tensor_bytes


@dataclass(frozen=True)
class Verified:
    """What was found sound.

    Attributes:
        files: files compared with their checksum.
        stored_bytes: their bytes.
        tensors: tensors compared with their checksum.
        matrices: matrices decoded.
    """

    files: int
    stored_bytes: int
    tensors: int
    matrices: int


def verify(
    directory: str | os.PathLike[str], progress: Callable[[int], object] | None = None
) -> Verified:
    """Checks, in this order: the manifest, every file's checksum, headers and geometry, the model
    that config.json describes, every tensor's checksum, every symbol stream, every decoded weight.

    Args:
        directory: a compressed checkpoint.
        progress: called with bytes as they are found sound; twice the stored bytes in the end.

    Raises:
        CorruptError: the first thing that is not as it was written.
        FormatVersionError: another format version.
    """
    container = Container.open(directory, progress=progress)
    check(container)
    listed = container.manifest["tensors"]
    matrices = 0
    for name in [*container.dense_names(), *container.carried]:
        tensor = container.read(name)
        _compare(container, name, tensor, listed[name]["sha256"])
        if progress is not None:
            progress(tensor.nbytes)
    for path in container.modules:
        streams = container.experts(path)
        for leaf in ("stream", "offsets"):
            name = f"{path}.{leaf}"
            _compare(container, name, getattr(streams, leaf), listed[name]["sha256"])
        matrices += check_stream(streams)
        if progress is not None:
            progress(streams.stream.nbytes + streams.offsets.nbytes)
    for parameter, geometry in container.dense.items():
        coded = container.dense_matrix(parameter)
        for name, tensor in zip(geometry.tensors, (coded.stream, coded.offsets), strict=True):
            _compare(container, name, tensor, listed[name]["sha256"])
            if progress is not None:
                progress(tensor.nbytes)
        coded.decode()
        matrices += len(geometry.bands) * geometry.planes
    files = container.manifest["files"]
    stored = sum(entry["bytes"] for entry in files.values())
    return Verified(len(files), stored, len(listed), matrices)


def _compare(container: Container, name: str, tensor: torch.Tensor, expected: str) -> None:
    found = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
    if found != expected:
        raise CorruptError(
            f"{container.directory}: tensor {name} has sha256 {found}, the manifest says {expected}"
        )


def check_stream(streams: StoredExperts) -> int:
    """Decodes every matrix of an experts module.

    Returns:
        Their number.

    Raises:
        CorruptError: a stream that does not decode, or a weight that is not finite.
    """
    layout = streams.layout
    parsed: dict[tuple[int, int], codec.Tables] = {}
    for expert in range(layout.experts):
        for j, projection in enumerate(layout.projections):
            at = streams.tables_at(expert, j)
            if at not in parsed:
                parsed[at] = streams.tables(expert, j)
            weights = codec.decode_dense(parsed[at], streams.matrix(expert, j, parsed[at]))
            if not torch.isfinite(weights).all():
                raise CorruptError(f"{layout.path} expert {expert} {projection.name} is not finite")
    return layout.experts * len(layout.projections)
