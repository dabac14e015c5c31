"""Products of several encoded matrices with one activation each, in one compiled call.

A token of a mixture-of-experts model wants a few small matrices. Called one by one, half of their
time goes to the calls; here all are cut into pieces of rows, shared by torch's number of threads.
"""

from collections.abc import Sequence
from typing import Any

import numba as nb
import numpy as np
import torch
from torch import Tensor

from qmoe.codec.decoder import lanes, threads
from qmoe.codec.decoder.lanes import COUNT
from qmoe.codec.decoder.matrix import MOST_ORDERED, PADDING_WORDS, ParsedMatrix
from qmoe.codec.decoder.matvec_loops import (
    add_up,
    matvec_rows,
    place_classes,
    place_inputs,
    scale,
)
from qmoe.codec.decoder.vector_loops import (
    BLOCK,
    apply_lists,
    block_lists,
    block_sums,
)
from qmoe.codec.format.arrays import F32, I32, I64
from qmoe.codec.format.classes import CONTEXTS
from qmoe.codec.format.tables import Tables

MAX_ADVANCE = 63  # of a symbol: six bits
_CHUNK = 32  # rows of a piece of work; a multiple of four, as `matvec_rows` takes four together
# columns of a table of sizes and addresses: matrices as compiled code sees them
_LAST, _PIECES, _ENDS, _WORDS, _STARTS, _ROW_CLASS, _SLOT_CLASS, _SLOTS = range(8)
_COL_INDEX, _ROW_INDEX, _ROW_INDEX_NEG, _ORDER = range(8, 12)
_BITS, _TABLES, _TABLE_OF, _ENTRIES, _LANE_ENTRIES = range(12, 17)
VECTORS = lanes.AVAILABLE
MOST_TOKENS = 256  # of one pass: their inputs stay in the second-level cache


def matvec_pairs(matrices: Sequence[tuple[Tables, ParsedMatrix]], x: Tensor) -> Tensor:
    """``x[i] @ W[i].T`` for k matrices of one shape, decoded inside the products.

    A row's sum has one order, whatever the number of threads and the other matrices.

    Args:
        matrices: k parsed matrices [rows, cols].
        x: float32 [k, cols] on the CPU.

    Returns:
        float32 [k, rows].

    Raises:
        ValueError: x is of another kind or shape, or the matrices' shapes differ.
    """
    shapes = {(m.rows, m.cols) for _, m in matrices}
    if len(shapes) != 1:
        raise ValueError(f"the matrices must be of one shape, got {sorted(shapes)}")
    ((rows, cols),) = shapes
    shape = (len(matrices), cols)
    if x.dtype != torch.float32 or tuple(x.shape) != shape or x.device.type != "cpu":
        found = f"{x.dtype} {tuple(x.shape)} on {x.device}"
        raise ValueError(f"x must be float32 {list(shape)} on the CPU, got {found}")
    table = np.array([(*m.addresses, *t.addresses) for t, m in matrices], np.int64)
    width = max(m.span + 1 + MAX_ADVANCE * t.latch for t, m in matrices)
    pieces = matrices[0][1].pieces
    placed = np.empty((len(matrices), pieces * width), np.float32)
    classes = np.empty(placed.shape if VECTORS else (len(matrices), 0), np.int32)
    sums = np.empty((2, len(matrices), pieces, rows), np.float32)
    out = np.empty((len(matrices), rows), np.float32)
    arguments = (table, x.contiguous().numpy(), placed, classes, sums, out)
    run_all, run_shared = (
        (_vector, _vector_shared) if vectors_for(rows) else (_plain, _plain_shared)
    )
    threads.run(run_all, run_shared, arguments, len(matrices) * rows * cols)
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
    table = np.array([(*matrix.addresses, *tables.addresses)], np.int64)
    pieces, ends = matrix.pieces, matrix.span + 1
    placed = np.empty((pieces, ends * padded), np.float32)
    classes = np.empty(pieces * (ends + MAX_ADVANCE * tables.latch), np.int32)
    signs = 1 if matrix.row_index_neg is None else 2
    sums = np.empty((signs, pieces, matrix.rows, padded), np.float32)
    out = np.empty((matrix.rows, padded), np.float32)
    arguments = (table, columns.numpy(), placed, classes, sums, out)
    threads.run(_lists, _lists_shared, arguments, matrix.rows * matrix.cols)
    return torch.from_numpy(out)[:, : len(x)].T.contiguous()


def vectors_for(rows: int) -> bool:
    """Whether matrices of so many rows are multiplied in vector code."""
    return VECTORS and rows <= MOST_ORDERED


@nb.extending.intrinsic
def _pointer(context: Any, address: Any) -> Any:
    """The address as a pointer, for `carray`."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], nb.core.cgutils.voidptr_t)

    return nb.types.voidptr(nb.types.int64), code


@nb.njit(inline="always")
def _room(m: I64) -> int:
    """Positions of a piece and what a group of symbols may run over its end."""
    return m[_ENDS] + MAX_ADVANCE * (32 // m[_BITS])  # type: ignore[no-any-return]


@nb.njit(cache=True, nogil=True)
def _place(m: I64, x: F32, placed: F32) -> None:
    slots = nb.carray(_pointer(m[_SLOTS]), (m[_PIECES], m[_ENDS]), np.int32)
    col_index = nb.carray(_pointer(m[_COL_INDEX]), (x.size,), np.int16)
    shape = (m[_PIECES], _room(m))
    place_inputs(x, col_index, slots, placed[: shape[0] * shape[1]].reshape(shape))


@nb.njit(cache=True, nogil=True)
def _place_classes(m: I64, classes: I32) -> None:
    slot_class = nb.carray(_pointer(m[_SLOT_CLASS]), (m[_PIECES], m[_ENDS]), np.uint8)
    shape = (m[_PIECES], _room(m))
    place_classes(slot_class, classes[: shape[0] * shape[1]].reshape(shape))


@nb.njit(cache=True, nogil=True)
def _plain_rows(m: I64, first: int, end: int, placed: F32, sums: F32, negative: F32) -> None:
    pieces, ends, bits, rows = m[_PIECES], m[_ENDS], m[_BITS], sums.shape[1]
    matvec_rows(
        nb.carray(_pointer(m[_WORDS]), (m[_LAST] + 1 + PADDING_WORDS,), np.uint32),
        m[_LAST],
        nb.carray(_pointer(m[_STARTS]), (rows * pieces + 1,), np.int32),
        nb.carray(_pointer(m[_ROW_CLASS]), (rows,), np.uint8),
        nb.carray(_pointer(m[_SLOT_CLASS]), (pieces, ends), np.uint8),
        nb.carray(_pointer(m[_TABLE_OF]), (CONTEXTS,), np.uint8),
        nb.carray(_pointer(m[_ENTRIES]), (m[_TABLES] << bits,), np.uint64),
        bits,
        first,
        end,
        placed[: pieces * _room(m)].reshape(pieces, _room(m)),
        m[_ROW_INDEX] != m[_ROW_INDEX_NEG],
        sums,
        negative,
    )


@nb.njit(cache=True, nogil=True)
def _bases(m: I64) -> I32:
    """Place of each context's table, int32 [64]."""
    bases = np.zeros(64, np.int32)
    table_of = nb.carray(_pointer(m[_TABLE_OF]), (CONTEXTS,), np.uint8)
    for c in range(CONTEXTS):
        bases[c] = np.int32(table_of[c]) << m[_BITS]
    return bases


@nb.njit(cache=True, nogil=True)
def _vector_block(
    m: I64, piece: int, first: int, placed: F32, classes: I32, sums: F32, negative: F32
) -> None:
    pieces, bits, rows, room = m[_PIECES], m[_BITS], sums.size, _room(m)
    order = nb.carray(_pointer(m[_ORDER]), (pieces, rows), np.uint16)
    block_sums(
        nb.carray(_pointer(m[_WORDS]), (m[_LAST] + 1 + PADDING_WORDS,), np.uint32),
        m[_LAST],
        nb.carray(_pointer(m[_STARTS]), (rows * pieces + 1,), np.int32),
        nb.carray(_pointer(m[_ROW_CLASS]), (rows,), np.uint8),
        _bases(m),
        nb.carray(_pointer(m[_LANE_ENTRIES]), (m[_TABLES] << bits,), np.uint32),
        bits,
        piece,
        pieces,
        order[piece],
        first,
        classes[piece * room : (piece + 1) * room],
        placed[piece * room : (piece + 1) * room],
        m[_ENDS] - 1,
        m[_ROW_INDEX] != m[_ROW_INDEX_NEG],
        sums,
        negative,
    )


@nb.njit(cache=True, nogil=True)
def _finish(m: I64, sums: F32, negative: F32, out: F32) -> None:
    row_index = nb.carray(_pointer(m[_ROW_INDEX]), (out.size,), np.int16)
    below = nb.carray(_pointer(m[_ROW_INDEX_NEG]), (out.size,), np.int16)
    add_up(sums, negative, m[_ROW_INDEX] != m[_ROW_INDEX_NEG], row_index, below, out)


@nb.njit(cache=True, nogil=True)
def _plain(table: I64, x: F32, placed: F32, classes: I32, sums: F32, out: F32) -> None:
    for i in range(len(table)):
        _place(table[i], x[i], placed[i])
        _plain_rows(table[i], 0, out.shape[1], placed[i], sums[0, i], sums[1, i])
        _finish(table[i], sums[0, i], sums[1, i], out[i])


@nb.njit(cache=True, nogil=True, parallel=True)
def _plain_shared(table: I64, x: F32, placed: F32, classes: I32, sums: F32, out: F32) -> None:
    chunks = (out.shape[1] + _CHUNK - 1) // _CHUNK
    for i in range(len(table)):
        _place(table[i], x[i], placed[i])
    for t in nb.prange(len(table) * chunks):
        i, first = t // chunks, t % chunks * _CHUNK
        end = min(first + _CHUNK, out.shape[1])
        _plain_rows(table[i], first, end, placed[i], sums[0, i], sums[1, i])
    for i in range(len(table)):
        _finish(table[i], sums[0, i], sums[1, i], out[i])


@nb.njit(cache=True, nogil=True)
def _vector(table: I64, x: F32, placed: F32, classes: I32, sums: F32, out: F32) -> None:
    for i in range(len(table)):
        _place(table[i], x[i], placed[i])
        _place_classes(table[i], classes[i])
        for p in range(sums.shape[2]):
            for first in range(0, out.shape[1], BLOCK):
                _vector_block(
                    table[i], p, first, placed[i], classes[i], sums[0, i, p], sums[1, i, p]
                )
        _finish(table[i], sums[0, i], sums[1, i], out[i])


@nb.njit(cache=True, nogil=True, parallel=True)
def _vector_shared(table: I64, x: F32, placed: F32, classes: I32, sums: F32, out: F32) -> None:
    blocks, pieces = (out.shape[1] + BLOCK - 1) // BLOCK, sums.shape[2]
    for i in range(len(table)):
        _place(table[i], x[i], placed[i])
        _place_classes(table[i], classes[i])
    for t in nb.prange(len(table) * pieces * blocks):
        i, p, first = t // (pieces * blocks), t // blocks % pieces, t % blocks * BLOCK
        _vector_block(table[i], p, first, placed[i], classes[i], sums[0, i, p], sums[1, i, p])
    for i in range(len(table)):
        _finish(table[i], sums[0, i], sums[1, i], out[i])


@nb.njit(inline="always")
def _width(left: int) -> int:
    """Inputs of the next block, of so many that are left."""
    return 64 if left >= 64 else 32 if left >= 32 else 16


@nb.njit(cache=True, nogil=True)
def _place_many(m: I64, columns: F32, placed: F32) -> None:
    """placed[p]: blocks of 64 inputs, then of 32 and 16, each [positions, inputs of the block]."""
    cols, n = columns.shape
    slots = nb.carray(_pointer(m[_SLOTS]), (m[_PIECES], m[_ENDS]), np.int32)
    col_index = nb.carray(_pointer(m[_COL_INDEX]), (cols,), np.int16)
    for p in range(slots.shape[0]):
        to, ends = placed[p], slots.shape[1]
        for t in range(ends):
            column = slots[p, t]
            first = 0
            while first < n:
                width = _width(n - first)
                at = ends * first + t * width
                if column < cols:
                    by = scale(col_index[column])
                    for k in range(width):
                        to[at + k] = columns[column, first + k] * by
                else:
                    to[at : at + width] = np.float32(0)
                first += width


@nb.njit(cache=True, nogil=True)
def _list_block(m: I64, piece: int, first: int, placed: F32, classes: I32, sums: F32) -> None:
    pieces, bits, rows, n = m[_PIECES], m[_BITS], sums.shape[2], sums.shape[3]
    room, ends = _room(m), m[_ENDS]
    order = nb.carray(_pointer(m[_ORDER]), (pieces, rows), np.uint16)[piece]
    starts = nb.carray(_pointer(m[_STARTS]), (rows * pieces + 1,), np.int32)
    longest = np.int64(order[first]) * pieces + piece
    most = (starts[longest + 1] - starts[longest] + 32) * BLOCK  # a symbol has at least one bit
    places, values = np.empty(most, np.int32), np.empty(most, np.float32)
    count = block_lists(
        nb.carray(_pointer(m[_WORDS]), (m[_LAST] + 1 + PADDING_WORDS,), np.uint32),
        m[_LAST],
        starts,
        nb.carray(_pointer(m[_ROW_CLASS]), (rows,), np.uint8),
        _bases(m),
        nb.carray(_pointer(m[_LANE_ENTRIES]), (m[_TABLES] << bits,), np.uint32),
        bits,
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
        at = 0
        while at < n:
            width = _width(n - at)
            x = placed[piece, ends * at : ends * (at + width)]
            apply_lists(places, values, count, x, width, found)
            for k in range(min(BLOCK, rows - first)):
                row = order[first + k]
                for j in range(width):
                    sums[sign, piece, row, at + j] = found[k * width + j]
            at += width


@nb.njit(cache=True, nogil=True)
def _add_up_many(m: I64, sums: F32, first: int, end: int, out: F32) -> None:
    rows, n = out.shape
    row_index = nb.carray(_pointer(m[_ROW_INDEX]), (rows,), np.int16)
    below = nb.carray(_pointer(m[_ROW_INDEX_NEG]), (rows,), np.int16)
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
    _place_classes(table[0], classes)
    for p in range(sums.shape[1]):
        for first in range(0, len(out), BLOCK):
            _list_block(table[0], p, first, placed, classes, sums)
    _add_up_many(table[0], sums, 0, len(out), out)


@nb.njit(cache=True, nogil=True, parallel=True)
def _lists_shared(table: I64, columns: F32, placed: F32, classes: I32, sums: F32, out: F32) -> None:
    blocks, pieces = (len(out) + BLOCK - 1) // BLOCK, sums.shape[1]
    _place_many(table[0], columns, placed)
    _place_classes(table[0], classes)
    for t in nb.prange(pieces * blocks):
        _list_block(table[0], t // blocks, t % blocks * BLOCK, placed, classes, sums)
    for b in nb.prange(blocks):
        _add_up_many(table[0], sums, b * BLOCK, min((b + 1) * BLOCK, len(out)), out)
