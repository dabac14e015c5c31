"""Dense weights in vector code: 64 rows at a time, a lane each, through a tile of their integers.

The weights are written transposed, [cols, rows]: what the lanes hold of one column lies together
there. A product takes them as they are, `weights.T` being a view.
"""

from typing import Any

import numba as nb
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qmoe.codec.decoder import addresses as at
from qmoe.codec.decoder import threads
from qmoe.codec.decoder.lanes import (
    add,
    any_less,
    bits_at,
    both,
    drop,
    gather,
    high_byte,
    in_tile,
    kept,
    least,
    left8,
    load,
    pick64,
    right,
    splat,
    store,
    weights_of,
)
from qmoe.codec.decoder.matrix import ParsedMatrix
from qmoe.codec.decoder.matvec import put_classes
from qmoe.codec.decoder.matvec_loops import scale
from qmoe.codec.decoder.registers import STREAMS
from qmoe.codec.decoder.room import kept_room
from qmoe.codec.format.arrays import I8, I32, I64, U16, U32
from qmoe.codec.format.tables import Tables

BLOCK = STREAMS
_SHARE = 4  # blocks of a piece of work, which has a tile of its own


def dense_vectors(
    tables: Tables, matrix: ParsedMatrix, dtype: torch.dtype, room: Tensor | None = None
) -> Tensor:
    """Weights [rows, cols], float32 or bfloat16: a view of contiguous [cols, rows].

    Args:
        tables, matrix: of at most MOST_ORDERED rows.
        dtype: float32, or bfloat16 for those rounded to the nearest.
        room: uint8 [n], where they are put; None takes new memory.
    """
    size = matrix.cols * matrix.rows * dtype.itemsize
    room = torch.empty(size, dtype=torch.uint8) if room is None else room
    weights = room[:size].view(dtype).view(matrix.cols, matrix.rows)
    table = np.array(at.addresses(tables, matrix), np.int64)
    classes = np.empty(matrix.pieces * at.positions(tables, matrix), np.int32)
    bits = weights.view(torch.uint16 if dtype == torch.bfloat16 else torch.uint32).numpy()
    threads.run(_all, _all_shared, (table, classes, bits), weights.numel())
    return weights.T


def matmul_dense(tables: Tables, matrix: ParsedMatrix, x: Tensor) -> Tensor:
    """``x @ W.T`` by torch, with W decoded to the dtype of x, float32 or bfloat16, for the time of
    the call.

    Args:
        tables, matrix: of at most MOST_ORDERED rows.
        x: [n, cols] on the CPU.

    Returns:
        [n, rows], of the dtype of x.
    """
    room = kept_room(matrix.cols * matrix.rows * x.dtype.itemsize)
    return F.linear(x, dense_vectors(tables, matrix, x.dtype, room))


@nb.njit(cache=True, nogil=True)
def _fill_tile(m: I64, rows: int, piece: int, first: int, classes: I32, tile: I8) -> None:
    """tile[position, lane], int8: the integers of rows first + lane, where not zero."""
    starts, row_class, pieces = at.starts_of(m, rows), at.row_class_of(m, rows), at.pieces(m)
    start, row_at = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.int32)
    lane = np.arange(BLOCK).astype(np.int32)
    for k in range(BLOCK):
        row = min(first + k, rows - 1)
        start[k], row_at[k] = starts[row * pieces + piece], row_class[row]
    flat, span, limit = tile.reshape(-1), len(tile) - 1, at.last_word(m)
    places, weights = np.empty(4 * BLOCK, np.uint32), np.empty(4 * BLOCK, np.int32)
    arrays = at.words_of(m), at.bases(m), at.lane_entries_of(m), classes, flat, places, weights
    cursors = load(start, 0), load(row_at, 0), load(lane, 0)
    if at.index_bits(m) == 8:
        _run(arrays, limit, 8, cursors, span)
    else:
        _run(arrays, limit, at.index_bits(m), cursors, span)


@nb.njit(inline="always")
def _run(arrays: tuple[Any, ...], limit: int, bits: int, cursors: Any, span: int) -> None:
    words, bases, entries, classes, tile, places, weights = arrays
    bit, row_at, lane = cursors
    end, furthest = splat(span), splat(32 * limit + 31)
    mask, byte, position = splat((1 << bits) - 1), splat(255), splat(0xFFFF)
    at, weight = splat(0), splat(0)
    while any_less(at, end):
        base = pick64(bases, add(row_at, gather(classes, at)))
        window = bits_at(words, bit)
        total = left8(at)
        for k in range(32 // bits):
            entry = gather(entries, add(base, both(window, mask)))
            window, total = drop(window, entry), add(total, entry)
            # an escape does not move on, but adds to the weight before
            weight = add(kept(entry, weight), high_byte(entry))
            place = least(both(right(total, 8), position), end)
            store(places, BLOCK * k, in_tile(place, lane))
            store(weights, BLOCK * k, weight)
        # one by one: faster than the processor's scatter, and a tile of bytes stays in its cache
        for k in range(BLOCK * (32 // bits)):
            tile[places[k]] = weights[k]
        bit = least(add(bit, both(total, byte)), furthest)
        at = least(both(right(total, 8), position), end)


@nb.njit(inline="always")
def _scales(m: I64, rows: int, first: int) -> Any:
    """Of the rows of a block, then of their negative weights."""
    found = np.empty(2 * BLOCK, np.float32)
    row_index, row_index_neg = at.row_index_of(m, rows), at.row_index_neg_of(m, rows)
    for k in range(BLOCK):
        row = min(first + k, rows - 1)
        found[k], found[BLOCK + k] = scale(row_index[row]), scale(row_index_neg[row])
    return found


@nb.njit(cache=True, nogil=True)
def _blocks(m: I64, classes: I32, first: int, end: int, out: U16 | U32) -> None:
    """Rows first..end - 1 of all columns; each tile is left as it was found, all zeros."""
    cols, rows = out.shape
    slots, room, col_index = at.slots_of(m), at.room(m), at.col_index_of(m, cols)
    tile = np.zeros((slots.shape[1], BLOCK), np.int8)
    flat, line, everything = tile.reshape(-1), np.empty(BLOCK, out.dtype), out.reshape(-1)
    for block in range(first, end, BLOCK):
        by_row = _scales(m, rows, block)
        count = min(BLOCK, rows - block)
        for p in range(len(slots)):
            _fill_tile(m, rows, p, block, classes[p * room : (p + 1) * room], tile)
            for t in range(slots.shape[1]):
                column = slots[p, t]
                if column < cols:
                    by = scale(col_index[column])
                    if count == BLOCK:
                        to = column * rows + block
                        weights_of(flat, BLOCK * t, by, by_row, everything, to)
                    else:
                        weights_of(flat, BLOCK * t, by, by_row, line, 0)
                        out[column, block : block + count] = line[:count]
                tile[t] = 0


@nb.njit(cache=True, nogil=True)
def _clear(m: I64, out: U16 | U32) -> None:
    """Zeros where a column is not coded."""
    coded, slots = np.zeros(len(out) + 1, np.bool_), at.slots_of(m)
    for p in range(len(slots)):
        for t in range(slots.shape[1]):
            coded[slots[p, t]] = True
    for column in range(len(out)):
        if not coded[column]:
            out[column] = 0


@nb.njit(cache=True, nogil=True)
def _all(m: I64, classes: I32, out: U16 | U32) -> None:
    put_classes(m, classes)
    _clear(m, out)
    _blocks(m, classes, 0, out.shape[1], out)


@nb.njit(cache=True, nogil=True, parallel=True)
def _all_shared(m: I64, classes: I32, out: U16 | U32) -> None:
    put_classes(m, classes)
    _clear(m, out)
    step = BLOCK * _SHARE
    for t in nb.prange((out.shape[1] + step - 1) // step):
        _blocks(m, classes, t * step, min((t + 1) * step, out.shape[1]), out)
