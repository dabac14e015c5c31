"""CPU decoders: integers, dense weights, or a product that never writes the weights down.

Each public function's twin in `reference` is its definition. Work is cut by rows over a few
threads; the compiled loops release the interpreter lock and hold no shared state.
"""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qmoe.codec.decoder.loops import decode_rows, dense_rows
from qmoe.codec.decoder.matmul import matmul_few, matmul_vectors
from qmoe.codec.decoder.matrix import PADDING_WORDS, ParsedMatrix
from qmoe.codec.decoder.matvec import vectors_for
from qmoe.codec.decoder.matvec_loops import matvec_rows_batch
from qmoe.codec.decoder.registers import MATRIX_UNIT
from qmoe.codec.decoder.tiles import dense_vectors, matmul_dense
from qmoe.codec.decoder.vector_loops import FEW
from qmoe.codec.format.tables import Tables
from qmoe.types import QuantizedMatrix

# Where products that decode as they go win: at most so many inputs, by docs/log-codec.md. Measured
# at five rates from 0.88 to 3.97 stored bits a weight
_SPARSE = 1.5  # payload bits a weight: below, most weights are in runs of zeros
_PLAIN_INPUTS, _VECTOR_INPUTS, _BESIDE_MATRIX_UNIT = 8, 128, 16
_ROWS_PER_THREAD = 1 << 18  # weights; below this a thread costs more than it saves


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=64, thread_name_prefix="qmoe-codec")


_POOL = _pool()


def _start_pool() -> None:
    global _POOL
    _POOL = _pool()


# A forked process has its parent's pool, but not its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_pool)


def decode_codes(tables: Tables, matrix: ParsedMatrix) -> QuantizedMatrix:
    """The quantized matrix that was encoded, equal in every element."""
    codes = torch.empty(matrix.rows, matrix.cols, dtype=torch.int8)
    out, shared = codes.numpy(), _shared(tables, matrix)
    _over_rows(matrix, lambda lo, hi: decode_rows(*shared, lo, hi, out))
    return QuantizedMatrix(codes, matrix.row_index, matrix.col_index, matrix.row_index_neg)


def decode_dense(
    tables: Tables, matrix: ParsedMatrix, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weights [rows, cols]: `QuantizedMatrix.dequantize` in float32, or rounded from it. They may
    lie column by column in memory, which a product takes as they are."""
    if vectors_for(matrix.rows):
        exact = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        return dense_vectors(tables, matrix, exact).to(dtype)
    weights = torch.empty(matrix.rows, matrix.cols, dtype=torch.float32)
    col, row, negative = matrix.scales
    out, shared = weights.numpy(), _shared(tables, matrix)
    _over_rows(matrix, lambda lo, hi: dense_rows(*shared, lo, hi, row, negative, col, out))
    return weights.to(dtype)


def matvec(tables: Tables, matrix: ParsedMatrix, x: Tensor) -> Tensor:
    """``x @ W.T`` with W decoded inside the product: [n, cols] -> float32 [n, rows].

    A row of the result does not depend on the other rows, whichever loop computes it.

    Raises:
        ValueError: x is not float32 [n, cols] on the CPU.
    """
    shape = tuple(x.shape)
    if x.dtype != torch.float32 or shape[1:] != (matrix.cols,) or x.device.type != "cpu":
        raise ValueError(
            f"x must be float32 [n, {matrix.cols}] on the CPU, got {x.dtype} {shape} on {x.device}"
        )
    n = len(x)
    if n == 0:
        return torch.empty(0, matrix.rows)
    if n <= FEW:
        return matmul_few([(tables, matrix)], [n], x)
    return (matmul_vectors if vectors_for(matrix.rows) else _batch)(tables, matrix, x)


def linear(tables: Tables, matrix: ParsedMatrix, x: Tensor) -> Tensor:
    """``x @ W.T`` by `matvec` or a dense product of decoded weights, whichever is faster.

    Args:
        tables, matrix: parsed.
        x: [n, cols] on any device, of a dtype that torch multiplies.

    Returns:
        [n, rows], dtype and device of x. No gradient reaches x.
    """
    x = x.detach()
    if decodes_inside(matrix, len(x), x.dtype):
        return matvec(tables, matrix, x.float().cpu().contiguous()).to(x.device, x.dtype)
    exact = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    if x.dtype == exact and x.device.type == "cpu" and vectors_for(matrix.rows):
        return matmul_dense(tables, matrix, x)
    return F.linear(x, decode_dense(tables, matrix, exact).to(x.device, x.dtype))


def decodes_inside(matrix: ParsedMatrix, n: int, dtype: torch.dtype) -> bool:
    """Whether `matvec` of n inputs is faster than a dense product of decoded weights, as measured
    (docs/log-codec.md): what counts is the number of symbols, hence of bits, per weight.

    Args:
        matrix: of the product.
        n: inputs.
        dtype: of the dense product.
    """
    sparse = int(matrix.stream_start[-1]) < _SPARSE * matrix.rows * matrix.cols
    if not vectors_for(matrix.rows):
        return n <= (_PLAIN_INPUTS if sparse else FEW)
    if dtype == torch.bfloat16 and MATRIX_UNIT:
        return n <= _BESIDE_MATRIX_UNIT * (2 if sparse else 1)
    return sparse or n <= _VECTOR_INPUTS


def _batch(tables: Tables, matrix: ParsedMatrix, x: Tensor) -> Tensor:
    n = len(x)
    scaled = torch.zeros(n, matrix.cols + 1)
    torch.mul(x, matrix.col_scale, out=scaled[:, :-1])
    by_slot = scaled[:, matrix.slots.long()]  # [n, pieces, span + 1]
    gathered = by_slot.permute(1, 2, 0).contiguous().numpy()
    split = matrix.row_scale_neg is not None
    sums = np.zeros((2, matrix.pieces, matrix.rows, n), np.float32)
    shared = _shared(tables, matrix)[:-1]
    _over_rows(matrix, lambda lo, hi: matvec_rows_batch(*shared, lo, hi, gathered, split, sums))
    total, below = (sum(torch.from_numpy(part), torch.zeros(())) for part in sums)
    y = total * matrix.row_scale[:, None]
    if matrix.row_scale_neg is not None:
        y += below * (matrix.row_scale_neg - matrix.row_scale)[:, None]
    return y.T.contiguous()


def _shared(tables: Tables, matrix: ParsedMatrix) -> tuple[Any, ...]:
    """Arguments common to the loops; the last is `slots`."""
    words, start, row_class, slot_class, slots = matrix.arrays
    last = words.size - PADDING_WORDS - 1
    lookup = tables.lookup.reshape(-1)
    return words, last, start, row_class, slot_class, tables.table_of, lookup, tables.limit, slots


def _over_rows(matrix: ParsedMatrix, work: Callable[[int, int], None]) -> None:
    """Runs work(first row, end row) over all rows, on torch's number of threads or fewer."""
    threads = min(
        torch.get_num_threads(), matrix.rows * matrix.cols // _ROWS_PER_THREAD, matrix.rows
    )
    if threads < 2:
        work(0, matrix.rows)
        return
    cuts = [matrix.rows * k // threads for k in range(threads + 1)]
    for done in [_POOL.submit(work, lo, hi) for lo, hi in itertools.pairwise(cuts)]:
        done.result()
