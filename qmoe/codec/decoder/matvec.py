"""Products of several encoded matrices with one activation each, in one compiled call.

A token of a mixture-of-experts model wants a few small matrices. Called one by one, half of their
time goes to the calls; here all are cut into pieces of rows, shared by torch's number of threads.
"""

import os
import threading
from collections.abc import Sequence
from typing import Any

import numba as nb
import numpy as np
import torch
from torch import Tensor

from qmoe.codec.decoder.matrix import PADDING_WORDS, ParsedMatrix
from qmoe.codec.decoder.matvec_loops import matvec_rows, place_inputs
from qmoe.codec.format.arrays import F32, I64
from qmoe.codec.format.classes import CONTEXTS
from qmoe.codec.format.tables import Tables

MAX_ADVANCE = 63  # of a symbol: six bits
_CHUNK = 32  # rows of a piece of work; a multiple of four, as `matvec_rows` takes four together
_SMALL = 1 << 18  # weights; below this (an eighth of a millisecond) one thread does it alone
_PARALLEL = threading.Lock()  # held during a parallel call: not every threading layer allows two
# columns of a table of sizes and addresses: matrices as compiled code sees them
_LIMIT, _PIECES, _ENDS, _WORDS, _STARTS, _ROW_CLASS, _SLOT_CLASS, _SLOTS = range(8)
_COL_SCALE, _ROW_SCALE, _ROW_SCALE_NEG, _BITS, _TABLES, _TABLE_OF, _ENTRIES = range(8, 15)


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
    room = max(m.pieces * (m.span + 1 + MAX_ADVANCE * t.latch) for t, m in matrices)
    placed = np.empty((len(matrices), room), np.float32)
    out = np.empty((len(matrices), rows), np.float32)
    arguments = (table, x.contiguous().numpy(), placed, out)
    threads = min(torch.get_num_threads(), nb.config.NUMBA_NUM_THREADS)
    if threads < 2 or len(matrices) * rows * cols < _SMALL or not _PARALLEL.acquire(blocking=False):
        _serial(*arguments)
    else:
        try:
            nb.set_num_threads(threads)
            _parallel(*arguments)
        finally:
            _PARALLEL.release()
    return torch.from_numpy(out)


# A forked process cannot use its parent's threads: the copy of the lock stays held.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _PARALLEL.acquire(blocking=False))


@nb.extending.intrinsic
def _pointer(context: Any, address: Any) -> Any:
    """The address as a pointer, for `carray`."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], nb.core.cgutils.voidptr_t)

    return nb.types.voidptr(nb.types.int64), code


@nb.njit(cache=True, nogil=True)
def _place(m: I64, x: F32, placed: F32) -> None:
    slots = nb.carray(_pointer(m[_SLOTS]), (m[_PIECES], m[_ENDS]), np.int32)
    col_scale = nb.carray(_pointer(m[_COL_SCALE]), (x.size,), np.float32)
    room = m[_ENDS] + MAX_ADVANCE * (32 // m[_BITS])
    place_inputs(x, col_scale, slots, placed[: m[_PIECES] * room].reshape(m[_PIECES], room))


@nb.njit(cache=True, nogil=True)
def _multiply(m: I64, first: int, end: int, placed: F32, out: F32) -> None:
    pieces, ends, bits, rows = m[_PIECES], m[_ENDS], m[_BITS], out.size
    room = ends + MAX_ADVANCE * (32 // bits)
    matvec_rows(
        nb.carray(_pointer(m[_WORDS]), (m[_LIMIT] + PADDING_WORDS,), np.uint32),
        m[_LIMIT],
        nb.carray(_pointer(m[_STARTS]), (rows * pieces + 1,), np.int32),
        nb.carray(_pointer(m[_ROW_CLASS]), (rows,), np.uint8),
        nb.carray(_pointer(m[_SLOT_CLASS]), (pieces, ends), np.uint8),
        nb.carray(_pointer(m[_TABLE_OF]), (CONTEXTS,), np.uint8),
        nb.carray(_pointer(m[_ENTRIES]), (m[_TABLES] << bits,), np.uint64),
        bits,
        first,
        end,
        placed[: pieces * room].reshape(pieces, room),
        m[_ROW_SCALE] != m[_ROW_SCALE_NEG],
        nb.carray(_pointer(m[_ROW_SCALE]), (rows,), np.float32),
        nb.carray(_pointer(m[_ROW_SCALE_NEG]), (rows,), np.float32),
        out,
    )


@nb.njit(cache=True, nogil=True)
def _serial(table: I64, x: F32, placed: F32, out: F32) -> None:
    for i in range(len(table)):
        _place(table[i], x[i], placed[i])
        _multiply(table[i], 0, out.shape[1], placed[i], out[i])


@nb.njit(cache=True, nogil=True, parallel=True)
def _parallel(table: I64, x: F32, placed: F32, out: F32) -> None:
    chunks = (out.shape[1] + _CHUNK - 1) // _CHUNK
    for i in range(len(table)):
        _place(table[i], x[i], placed[i])
    for t in nb.prange(len(table) * chunks):
        i, first = t // chunks, t % chunks * _CHUNK
        _multiply(table[i], first, min(first + _CHUNK, out.shape[1]), placed[i], out[i])
