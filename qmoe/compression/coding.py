"""From integers to bytes: every matrix that the write path solves is encoded here.

That is the experts of a layer, the bands of a dense matrix, and the samples from which a run learns
how large things become. The store receives the bytes and knows no integers.
"""

from collections.abc import Sequence

from qmoe import codec
from qmoe.store.block import EncodedBatch
from qmoe.types import QuantizedMatrix


def encode_experts(
    projection: str, experts: Sequence[int], matrices: Sequence[QuantizedMatrix]
) -> EncodedBatch:
    """Encodes matrices of one projection with tables that they share.

    Args:
        projection: its name.
        experts: one for each matrix.
        matrices: all of one shape, on the CPU.

    Raises:
        ValueError: what `qmoe.codec.encode_group` refuses.
    """
    rows, cols = matrices[0].codes.shape
    encoded = codec.encode_group(matrices)
    ideal_bits = codec.ideal_bits(matrices, encoded.scale_bits)
    zeros = sum(int((m.codes == 0).sum()) for m in matrices)
    return EncodedBatch(projection, list(experts), (rows, cols), encoded, ideal_bits, zeros)


def encode_planes(
    planes: Sequence[QuantizedMatrix], shape: tuple[int, int]
) -> list[codec.EncodedGroup]:
    """Encodes the planes of one band of a dense matrix, each with tables of its own.

    Args:
        planes: matrices whose sum is the band.
        shape: (rows, cols) that each must have.

    Raises:
        ValueError: a plane of another shape.
    """
    for plane in planes:
        if tuple(plane.codes.shape) != shape:
            raise ValueError(f"a plane of {tuple(plane.codes.shape)} in a band of {shape}")
    return [codec.encode_group([plane]) for plane in planes]


def trial_bits(matrices: Sequence[QuantizedMatrix]) -> tuple[float, float]:
    """What matrices with common tables would take: bits of the tables, bits of all the rest."""
    encoded = codec.encode_group(matrices)
    tables = 8.0 * encoded.tables.numel()
    return tables, encoded.stored_bits - tables
