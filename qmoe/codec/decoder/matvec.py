"""Products of several encoded matrices with one activation each, in one compiled call.

A token of a mixture-of-experts model wants a few small matrices. Called one by one, half of their
time goes to the calls; here all are cut into pieces of rows, shared by torch's number of threads.
"""

from collections.abc import Sequence

import numba as nb
import numpy as np
import torch
from torch import Tensor

from qmoe.codec.decoder import addresses as at
from qmoe.codec.decoder import registers, threads
from qmoe.codec.decoder.matrix import MOST_ORDERED, ParsedMatrix
from qmoe.codec.decoder.matvec_loops import add_up, matvec_rows, place_classes, place_inputs
from qmoe.codec.decoder.vector_loops import BLOCK, block_sums
from qmoe.codec.format.arrays import F32, I32, I64
from qmoe.codec.format.tables import Tables

_CHUNK = 32  # rows of a piece of work; a multiple of four, as `matvec_rows` takes four together
VECTORS = registers.AVAILABLE


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
    table = np.array([at.addresses(t, m) for t, m in matrices], np.int64)
    width = max(at.positions(t, m) for t, m in matrices)
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


def vectors_for(rows: int) -> bool:
    """Whether matrices of so many rows are multiplied in vector code."""
    return VECTORS and rows <= MOST_ORDERED


@nb.njit(cache=True, nogil=True)
def _place(m: I64, x: F32, placed: F32) -> None:
    slots, shape = at.slots_of(m), (len(at.slots_of(m)), at.room(m))
    to = placed[: shape[0] * shape[1]].reshape(shape)
    place_inputs(x, at.col_index_of(m, x.size), slots, to)


@nb.njit(cache=True, nogil=True)
def put_classes(m: I64, classes: I32) -> None:
    """Classes of all positions, a piece's `at.room` after another."""
    slot_class = at.slot_class_of(m)
    shape = (len(slot_class), at.room(m))
    place_classes(slot_class, classes[: shape[0] * shape[1]].reshape(shape))


@nb.njit(cache=True, nogil=True)
def _plain_rows(m: I64, first: int, end: int, placed: F32, sums: F32, negative: F32) -> None:
    pieces, rows = sums.shape
    matvec_rows(
        at.words_of(m),
        at.last_word(m),
        at.starts_of(m, rows),
        at.row_class_of(m, rows),
        at.slot_class_of(m),
        at.table_of(m),
        at.entries_of(m),
        at.index_bits(m),
        first,
        end,
        placed[: pieces * at.room(m)].reshape(pieces, at.room(m)),
        at.split(m),
        sums,
        negative,
    )


@nb.njit(cache=True, nogil=True)
def _vector_block(
    m: I64, piece: int, first: int, placed: F32, classes: I32, sums: F32, negative: F32
) -> None:
    rows, room, slots = sums.size, at.room(m), at.slots_of(m)
    block_sums(
        at.words_of(m),
        at.last_word(m),
        at.starts_of(m, rows),
        at.row_class_of(m, rows),
        at.bases(m),
        at.lane_entries_of(m),
        at.index_bits(m),
        piece,
        len(slots),
        at.order_of(m, rows)[piece],
        first,
        classes[piece * room : (piece + 1) * room],
        placed[piece * room : (piece + 1) * room],
        slots.shape[1] - 1,
        at.split(m),
        sums,
        negative,
    )


@nb.njit(cache=True, nogil=True)
def _finish(m: I64, sums: F32, negative: F32, out: F32) -> None:
    row_index, below = at.row_index_of(m, out.size), at.row_index_neg_of(m, out.size)
    add_up(sums, negative, at.split(m), row_index, below, out)


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
        put_classes(table[i], classes[i])
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
        put_classes(table[i], classes[i])
    for t in nb.prange(len(table) * pieces * blocks):
        i, p, first = t // (pieces * blocks), t // blocks % pieces, t % blocks * BLOCK
        _vector_block(table[i], p, first, placed[i], classes[i], sums[0, i, p], sums[1, i, p])
    for i in range(len(table)):
        _finish(table[i], sums[0, i], sums[1, i], out[i])
