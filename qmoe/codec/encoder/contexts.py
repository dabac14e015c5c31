"""The encoder's view of a matrix: its classes, its non-zeros by stream, the statistics by context.

Row classes start from energies and are then chosen by what they cost: the entropy of the row under
each class plus that of the class itself. Where rows are alike, as after error feedback, this leaves
a single class, which costs nothing; energies alone would store their noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numba as nb
import numpy as np

from qmoe.codec.encoder.loops import count_contexts, nonzeros
from qmoe.codec.encoder.table_choice import cut
from qmoe.codec.format.arrays import F32, F64, I8, I64, U8, U16
from qmoe.codec.format.classes import CONTEXTS, Classes, classify, energies
from qmoe.codec.format.geometry import Geometry, geometry

_MAX_SHIFT = 12  # row classes 0..24
_REACH = 2  # classes that a row may move in one round


@dataclass(frozen=True)
class Prepared:
    """One matrix on its way to words.

    Attributes:
        classes: of rows and columns.
        geometry: of its streams.
        position, value: uint16 and int8, non-zeros stream by stream, see `nonzeros`.
        start: int64 [streams + 1], first non-zero of each stream.
    """

    classes: Classes
    geometry: Geometry
    position: U16
    value: I8
    start: I64


def prepare(codes: Sequence[I8], rounds: int) -> tuple[list[Prepared], I64]:
    """Classes and non-zeros of a group.

    Args:
        codes: int8 [rows, cols] each, C-contiguous, of one shape.
        rounds: reassignments of row classes.

    Returns:
        The matrices and their histogram, int64 [CONTEXTS, 256], count of q at index q + 128.
    """
    factors = [energies(c) for c in codes]
    rows = np.concatenate([r for r, _ in factors])
    spread = np.abs(np.rint(2 * np.log2(rows[rows > 0]))).max(initial=0)
    shift = int(min(spread, _MAX_SHIFT))
    group = [_list(q, classify(*factor, shift)) for q, factor in zip(codes, factors, strict=True)]
    histogram = _count(group)
    for _ in range(rounds):
        group = _assign_rows(group, histogram)
        histogram = _count(group)
    return group, histogram


def _list(codes: I8, classes: Classes) -> Prepared:
    shape = geometry(classes.col)
    count = int(np.count_nonzero(codes))
    position, value = np.empty(count + 1, np.uint16), np.empty(count + 1, np.int8)
    start = np.empty(codes.shape[0] * shape.pieces + 1, np.int64)
    nonzeros(codes, shape.slots[:, 1:-1].astype(np.uint16), position, value, start)
    return Prepared(classes, shape, position[:count], value[:count], start)


def _count(group: Sequence[Prepared]) -> I64:
    histogram = np.zeros((CONTEXTS, 256), np.int64)
    weights = np.zeros(CONTEXTS, np.int64)
    for m in group:
        count_contexts(
            m.position, m.value, m.start, m.classes.row, m.geometry.slot_class, histogram.ravel()
        )
        pairs = np.convolve(np.bincount(m.classes.row), m.classes.col_counts())
        weights[: pairs.size] += pairs
    histogram[:, 128] = weights - histogram.sum(1)
    return histogram


def _assign_rows(group: Sequence[Prepared], histogram: I64) -> list[Prepared]:
    """Moves every row to its cheapest class under the statistics so far."""
    starts = np.zeros(CONTEXTS, np.int64)
    starts[cut(histogram)[1:]] = 1
    table = np.cumsum(starts)
    counts = np.zeros((int(table[-1]) + 1, 256))
    np.add.at(counts, table, histogram)
    counts += 0.05 * (histogram.sum(0) > 0) + 1e-9
    lengths = -np.log2(counts / counts.sum(1, keepdims=True))[table]
    extra = np.ascontiguousarray((lengths - lengths[:, 128:129]).T.astype(np.float32))
    rows = np.bincount(np.concatenate([m.classes.row for m in group]), minlength=CONTEXTS)
    class_cost = np.log2(rows.sum() / (rows + 0.1))
    top = int(np.flatnonzero(rows)[-1])
    out = []
    for m in group:
        zeros = (
            np.correlate(lengths[:, 128], m.classes.col_counts(), "valid")
            + class_cost[: CONTEXTS + 1 - m.classes.col_counts().size]
        )
        new = np.empty_like(m.classes.row)
        _cheapest(
            m.position,
            m.value,
            m.start,
            m.classes.row,
            m.geometry.slot_class,
            extra,
            zeros,
            top,
            new,
        )
        out.append(replace(m, classes=Classes(new, m.classes.col)))
    return out


@nb.njit(cache=True, nogil=True)
def _cheapest(
    position: U16,
    value: I8,
    start: I64,
    row_class: U8,
    slot_class: U8,
    extra: F32,
    zeros: F64,
    top: int,
    out: U8,
) -> None:
    """Cheapest class of each row within _REACH.

    Args:
        position, value, start, row_class, slot_class: of the matrix.
        extra: float32 [256, contexts], bits of q (at q + 128) beyond those of a zero.
        zeros: float64 [classes], bits of a row of zeros in a class, and of the class.
        top: largest class.
        out: uint8 [rows].
    """
    pieces = slot_class.shape[0]
    cost = np.empty(2 * _REACH + 1, np.float64)
    for row in range(row_class.size):
        low = max(int(row_class[row]) - _REACH, 0)
        high = min(int(row_class[row]) + _REACH, top)
        for a in range(low, high + 1):
            cost[a - low] = zeros[a]
        # A row's cost in a class is that of all zeros plus what its non-zeros cost beyond a zero:
        # rows are sparse, so only those are visited, once for all classes within reach.
        for stream in range(row * pieces, (row + 1) * pieces):
            classes = slot_class[stream - row * pieces]
            for k in range(start[stream], start[stream + 1]):
                line = extra[np.uint8(value[k]) ^ np.uint8(128)]
                first = np.uint64(classes[position[k]]) + np.uint64(low)
                for d in range(high + 1 - low):
                    cost[d] += line[first + np.uint64(d)]
        best = 0
        for d in range(1, high + 1 - low):
            if cost[d] < cost[best]:
                best = d
        out[row] = low + best
