"""Matrices to measure and to test kernels with: of the class mix of a real quantized expert, and of
any size of integers.

Gaussian weights on steps that spread over columns and rows as the rate-distortion quantizer spreads
them: many columns of zeros, few heavy ones. At 0.8 bit the stand-in agrees with experts of the
example model in zeros (0.80), largest integer (14), coded columns (2 of 3), symbols per weight
(0.25) and the cache lines that the loop touches (docs/log-kernels.md).
"""

from collections.abc import Sequence

import torch

from qmoe.codec import ParsedMatrix, Tables, encode_group, parse_matrix, parse_tables
from qmoe.kernels.pack import PackedProjection, pack_projection
from qmoe.store.stored_experts import StoredExperts
from qmoe.types import ExpertsLayout, ProjectionShape, QuantizedMatrix

SPREAD_COLS, SPREAD_ROWS = 1.6, 0.25  # standard deviations of the log energy
CAP = 1.5  # largest rms of a column in steps, before rows spread
SIZE_AT_BITS = {0.5: 0.11, 0.8: 0.22, 1.2: 0.41, 2.0: 0.74}  # median rms of a column in steps


def sample_matrix(rows: int, cols: int, bits: float = 0.8, seed: int = 0) -> QuantizedMatrix:
    """A random quantized matrix of about `bits` (a key of SIZE_AT_BITS) per weight."""
    g = torch.Generator().manual_seed(seed)
    row = torch.randn(rows, 1, generator=g).mul(SPREAD_ROWS).exp()
    spread = torch.randn(1, cols, generator=g).mul(SPREAD_COLS).exp()
    size = (spread * SIZE_AT_BITS[bits]).clamp(max=CAP if bits <= 1.2 else 4 * CAP)
    codes = torch.randn(rows, cols, generator=g).mul_(row).mul_(size).round_().clamp_(-127, 127)
    row_scale = (torch.randn(rows, generator=g) * 5).round() * 4 - 300
    col_scale = (spread[0].log2() * -4).round() * 16
    return QuantizedMatrix(codes.to(torch.int8), row_scale.short(), col_scale.short())


def rough_matrix(
    rows: int, cols: int, size: float = 0.4, negative: bool = False, seed: int = 0
) -> QuantizedMatrix:
    """Random codes of log-normal column energies around `size`; `negative` makes an asymmetric
    ternary grid.
    """
    g = torch.Generator().manual_seed(seed)
    codes = torch.randn(rows, cols, generator=g) * torch.randn(1, cols, generator=g).exp() * size
    codes = codes.round().clamp(-1 if negative else -127, 1 if negative else 127).to(torch.int8)
    scale = torch.randint(-320, -250, (2, rows), generator=g).short()
    col = (torch.randint(-6, 6, (cols,), generator=g) * 16).short()
    return QuantizedMatrix(codes, scale[0], col, scale[1] if negative else None)


def parsed(
    matrices: Sequence[QuantizedMatrix], limit: int | None = None
) -> list[tuple[Tables, ParsedMatrix]]:
    """The matrices as one group, encoded with codes of at most `limit` bits and parsed again."""
    group = encode_group(matrices, limit)
    tables = parse_tables(group.tables)
    return [(tables, parse_matrix(tables, blob)) for blob in group.matrices]


def packed(
    matrices: Sequence[QuantizedMatrix], segments: int = 1, limit: int | None = None
) -> PackedProjection:
    """A projection from quantized matrices, by way of the codec."""
    return pack_projection(parsed(matrices, limit), segments)


def stored_layer(
    shapes: Sequence[tuple[int, int]], experts: int, bits: float = 0.8, distinct: int = 1
) -> StoredExperts:
    """A layer of random experts as a checkpoint stores it: `distinct` of them, again and again.

    Args:
        shapes: rows and cols of each projection: gate and up together, down.
        experts: number of experts.
        bits: see `sample_matrix`.
        distinct: encoded matrices of each projection.
    """
    names = ("gate_up", "down")[-len(shapes) :]
    kept, offsets = [], torch.zeros(experts, len(shapes), 4, dtype=torch.long)
    at = 0
    for j, shape in enumerate(shapes):
        group = encode_group([sample_matrix(*shape, bits, seed) for seed in range(distinct)])
        kept.append(group.tables)
        offsets[:, j, 0], offsets[:, j, 1] = at, at + group.tables.numel()
        at += group.tables.numel()
        for k, blob in enumerate(group.matrices):
            kept.append(blob)
            offsets[k::distinct, j, 2], offsets[k::distinct, j, 3] = at, at + blob.numel()
            at += blob.numel()
    each = zip(names, shapes, strict=True)
    projections = tuple(ProjectionShape(n, *shape, n == "down") for n, shape in each)
    return StoredExperts(
        ExpertsLayout("layer", "fused", experts, projections), torch.cat(kept), offsets
    )
