"""Products of encoded matrices with several activations each, in vector code: a stream is decoded
once for all of them. Every row of a result is bit for bit that of `matvec_pairs`.
"""

from collections.abc import Sequence

import numba as nb
import numpy as np
import torch
from torch import Tensor

from qmoe.codec.decoder import addresses as at
from qmoe.codec.decoder import threads
from qmoe.codec.decoder.matrix import ParsedMatrix
from qmoe.codec.decoder.matvec import matvec_pairs, put_classes, vectors_for
from qmoe.codec.decoder.matvec_loops import scale
from qmoe.codec.decoder.registers import COUNT
from qmoe.codec.decoder.vector_loops import BLOCK, FEW, apply_lists, block_few, block_lists
from qmoe.codec.format.arrays import F32, I32, I64
from qmoe.codec.format.tables import Tables

MOST_TOKENS = 256  # of one pass: their inputs stay in the second-level cache


def matmul_few(
    matrices: Sequence[tuple[Tables, ParsedMatrix]], counts: Sequence[int], x: Tensor
) -> Tensor:
    """``x[rows of i] @ W[i].T`` for k matrices of one shape, each with the next few rows of x, in
    one compiled call.

    Args:
        matrices: k parsed matrices [rows, cols].
        counts: rows of x for each, 1 to FEW.
        x: float32 [sum of counts, cols] on the CPU.

    Returns:
        float32 [sum of counts, rows].
    """
    pairs = [m for m, n in zip(matrices, counts, strict=True) for _ in range(n)]
    signed = any(m.row_index_neg is not None for _, m in matrices)
    if max(counts) == 1 or signed or not vectors_for(matrices[0][1].rows):
        return matvec_pairs(pairs, x)
    (rows, cols), pieces = (matrices[0][1].rows, matrices[0][1].cols), matrices[0][1].pieces
    table = np.array([at.addresses(t, m) for t, m in matrices], np.int64)
    width = pieces * max(at.positions(t, m) for t, m in matrices)
    ends = np.cumsum([0, *counts])
    placed = np.empty((len(matrices), FEW * width), np.float32)
    classes = np.empty((len(matrices), width), np.int32)
    sums = np.empty((len(matrices), pieces, rows, FEW), np.float32)
    out = np.empty((len(x), rows), np.float32)
    arguments = (table, ends, x.reshape(-1, cols).contiguous().numpy(), placed, classes, sums, out)
    threads.run(_few, _few_shared, arguments, len(matrices) * rows * cols)
    return torch.from_numpy(out)


def matmul_vectors(tables: Tables, matrix: ParsedMatrix, x: Tensor) -> Tensor:
    """``x @ W.T`` for several activations in vector code: every stream is decoded once into a list
    of places and values, which is then applied to 16 or 64 activations at a time.

    Each row of the result is bit for bit that of `matvec_pairs`.

    Args:
        tables, matrix: of at most MOST_ORDERED rows.
        x: float32 [n, cols] on the CPU.

    Returns:
        float32 [n, rows].
    """
    if len(x) > MOST_TOKENS:
        return torch.cat([matmul_vectors(tables, matrix, part) for part in x.split(MOST_TOKENS)])
    padded = -(-len(x) // COUNT) * COUNT
    columns = torch.zeros(matrix.cols, padded)
    columns[:, : len(x)] = x.T
    table = np.array([at.addresses(tables, matrix)], np.int64)
    pieces, ends = matrix.pieces, matrix.span + 1
    placed = np.empty((pieces, ends * padded), np.float32)
    classes = np.empty(pieces * at.positions(tables, matrix), np.int32)
    signs = 1 if matrix.row_index_neg is None else 2
    sums = np.empty((signs, pieces, matrix.rows, padded), np.float32)
    out = np.empty((matrix.rows, padded), np.float32)
    arguments = (table, columns.numpy(), placed, classes, sums, out)
    threads.run(_lists, _lists_shared, arguments, matrix.rows * matrix.cols)
    return torch.from_numpy(out)[:, : len(x)].T.contiguous()


@nb.njit(cache=True, nogil=True)
def _place_few(m: I64, x: F32, placed: F32) -> None:
    """placed: for each piece and pair of inputs the two at every position, 0 where none is."""
    slots, room, pairs = at.slots_of(m), at.room(m), (len(x) + 1) // 2
    col_index = at.col_index_of(m, x.shape[1])
    for p in range(len(slots)):
        for pair in range(pairs):
            to = placed[2 * room * (p * pairs + pair) :]
            first, second = x[2 * pair], x[min(2 * pair + 1, len(x) - 1)]
            for t in range(slots.shape[1]):
                column = slots[p, t]
                if column < x.shape[1]:
                    by = scale(col_index[column])
                    to[2 * t], to[2 * t + 1] = first[column] * by, second[column] * by
                else:
                    to[2 * t] = to[2 * t + 1] = np.float32(0)
            to[2 * slots.shape[1] : 2 * room] = np.float32(0)


@nb.njit(cache=True, nogil=True)
def _few_block(
    m: I64, n: int, piece: int, first: int, placed: F32, classes: I32, sums: F32
) -> None:
    rows, room, slots, pairs = len(sums), at.room(m), at.slots_of(m), (n + 1) // 2
    found, order = np.empty(FEW * BLOCK, np.float32), at.order_of(m, rows)[piece]
    block_few(
        at.words_of(m),
        at.last_word(m),
        at.starts_of(m, rows),
        at.row_class_of(m, rows),
        at.bases(m),
        at.lane_entries_of(m),
        at.index_bits(m),
        piece,
        len(slots),
        order,
        first,
        classes[piece * room : (piece + 1) * room],
        slots.shape[1] - 1,
        placed[2 * pairs * room * piece : 2 * pairs * room * (piece + 1)],
        pairs,
        found,
    )
    for k in range(min(BLOCK, rows - first)):
        row = order[first + k]
        for i in range(n):
            sums[row, i] = found[(i // 2 * BLOCK + k) * 2 + i % 2]


@nb.njit(cache=True, nogil=True)
def _finish_few(m: I64, sums: F32, out: F32) -> None:
    row_index = at.row_index_of(m, out.shape[1])
    for row in range(out.shape[1]):
        by = scale(row_index[row])
        for i in range(len(out)):
            total = np.float32(0)
            for p in range(len(sums)):
                total += sums[p, row, i]
            out[i, row] = total * by


@nb.njit(cache=True, nogil=True)
def _few(table: I64, ends: I64, x: F32, placed: F32, classes: I32, sums: F32, out: F32) -> None:
    for i in range(len(table)):
        n = ends[i + 1] - ends[i]
        _place_few(table[i], x[ends[i] : ends[i + 1]], placed[i])
        put_classes(table[i], classes[i])
        for p in range(sums.shape[1]):
            for first in range(0, out.shape[1], BLOCK):
                _few_block(table[i], n, p, first, placed[i], classes[i], sums[i, p])
        _finish_few(table[i], sums[i], out[ends[i] : ends[i + 1]])


@nb.njit(cache=True, nogil=True, parallel=True)
def _few_shared(
    table: I64, ends: I64, x: F32, placed: F32, classes: I32, sums: F32, out: F32
) -> None:
    blocks, pieces = (out.shape[1] + BLOCK - 1) // BLOCK, sums.shape[1]
    for i in nb.prange(len(table)):
        _place_few(table[i], x[ends[i] : ends[i + 1]], placed[i])
        put_classes(table[i], classes[i])
    for t in nb.prange(len(table) * pieces * blocks):
        i, p, first = t // (pieces * blocks), t // blocks % pieces, t % blocks * BLOCK
        n = ends[i + 1] - ends[i]
        _few_block(table[i], n, p, first, placed[i], classes[i], sums[i, p])
    for i in nb.prange(len(table)):
        _finish_few(table[i], sums[i], out[ends[i] : ends[i + 1]])


@nb.njit(inline="always")
def _width(left: int) -> int:
    """Inputs of the next block, of so many that are left."""
    return 64 if left >= 64 else 32 if left >= 32 else 16


@nb.njit(cache=True, nogil=True)
def _place_many(m: I64, columns: F32, placed: F32) -> None:
    """placed[p]: blocks of 64 inputs, then of 32 and 16, each [positions, inputs of the block]."""
    cols, n = columns.shape
    slots, col_index = at.slots_of(m), at.col_index_of(m, cols)
    for p in range(slots.shape[0]):
        to, ends = placed[p], slots.shape[1]
        for t in range(ends):
            column = slots[p, t]
            first = 0
            while first < n:
                width = _width(n - first)
                start = ends * first + t * width
                if column < cols:
                    by = scale(col_index[column])
                    for k in range(width):
                        to[start + k] = columns[column, first + k] * by
                else:
                    to[start : start + width] = np.float32(0)
                first += width


@nb.njit(cache=True, nogil=True)
def _list_block(m: I64, piece: int, first: int, placed: F32, classes: I32, sums: F32) -> None:
    rows, n, room, slots = sums.shape[2], sums.shape[3], at.room(m), at.slots_of(m)
    pieces, ends = slots.shape
    order, starts = at.order_of(m, rows)[piece], at.starts_of(m, rows)
    longest = np.int64(order[first]) * pieces + piece
    most = (starts[longest + 1] - starts[longest] + 32) * BLOCK  # a symbol has at least one bit
    places, values = np.empty(most, np.int32), np.empty(most, np.float32)
    count = block_lists(
        at.words_of(m),
        at.last_word(m),
        starts,
        at.row_class_of(m, rows),
        at.bases(m),
        at.lane_entries_of(m),
        at.index_bits(m),
        piece,
        pieces,
        order,
        first,
        classes[piece * room : (piece + 1) * room],
        ends - 1,
        places,
        values,
    )
    found = np.empty(64 * BLOCK, np.float32)
    for sign in range(sums.shape[0]):
        if sign == 1:
            for k in range(count * BLOCK):
                values[k] = min(values[k], np.float32(0))
        done = 0
        while done < n:
            width = _width(n - done)
            x = placed[piece, ends * done : ends * (done + width)]
            apply_lists(places, values, count, x, width, found)
            for k in range(min(BLOCK, rows - first)):
                row = order[first + k]
                for j in range(width):
                    sums[sign, piece, row, done + j] = found[k * width + j]
            done += width


@nb.njit(cache=True, nogil=True)
def _add_up_many(m: I64, sums: F32, first: int, end: int, out: F32) -> None:
    rows, n = out.shape
    row_index, below = at.row_index_of(m, rows), at.row_index_neg_of(m, rows)
    for row in range(first, end):
        by = scale(row_index[row])
        for k in range(n):
            total = np.float32(0)
            for p in range(sums.shape[1]):
                total += sums[0, p, row, k]
            out[row, k] = total * by
        if sums.shape[0] == 2:
            more = scale(below[row]) - by
            for k in range(n):
                under = np.float32(0)
                for p in range(sums.shape[1]):
                    under += sums[1, p, row, k]
                out[row, k] += under * more


@nb.njit(cache=True, nogil=True)
def _lists(table: I64, columns: F32, placed: F32, classes: I32, sums: F32, out: F32) -> None:
    _place_many(table[0], columns, placed)
    put_classes(table[0], classes)
    for p in range(sums.shape[1]):
        for first in range(0, len(out), BLOCK):
            _list_block(table[0], p, first, placed, classes, sums)
    _add_up_many(table[0], sums, 0, len(out), out)


@nb.njit(cache=True, nogil=True, parallel=True)
def _lists_shared(table: I64, columns: F32, placed: F32, classes: I32, sums: F32, out: F32) -> None:
    blocks, pieces = (len(out) + BLOCK - 1) // BLOCK, sums.shape[1]
    _place_many(table[0], columns, placed)
    put_classes(table[0], classes)
    for t in nb.prange(pieces * blocks):
        _list_block(table[0], t // blocks, t % blocks * BLOCK, placed, classes, sums)
    for b in nb.prange(blocks):
        _add_up_many(table[0], sums, b * BLOCK, min((b + 1) * BLOCK, len(out)), out)
