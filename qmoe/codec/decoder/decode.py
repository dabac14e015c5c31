"""CPU decoders: integers, dense weights, or a product that never writes the weights down.

Each public function's twin in `reference` is its definition. Work is cut by rows over a few
threads; the compiled loops release the interpreter lock and hold no shared state.
"""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qmoe.codec.decoder.loops import decode_rows, dense_rows
from qmoe.codec.decoder.matrix import PADDING_WORDS, ParsedMatrix
from qmoe.codec.decoder.matvec import matvec_pairs
from qmoe.codec.decoder.matvec_loops import matvec_rows_batch
from qmoe.codec.format.tables import Tables
from qmoe.types import QuantizedMatrix

_ROWS_PER_THREAD = 1 << 18  # weights; below this a thread costs more than it saves
_POOL = ThreadPoolExecutor(max_workers=64, thread_name_prefix="qmoe-codec")


def decode_codes(tables: Tables, matrix: ParsedMatrix) -> QuantizedMatrix:
    """The quantized matrix that was encoded, equal in every element."""
    codes = torch.empty(matrix.rows, matrix.cols, dtype=torch.int8)
    out, shared = codes.numpy(), _shared(tables, matrix)
    _over_rows(matrix, lambda lo, hi: decode_rows(*shared, lo, hi, out))
    return QuantizedMatrix(codes, matrix.row_index, matrix.col_index, matrix.row_index_neg)


def decode_dense(
    tables: Tables, matrix: ParsedMatrix, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weights [rows, cols]: `QuantizedMatrix.dequantize` in float32, or rounded from it."""
    weights = torch.empty(matrix.rows, matrix.cols, dtype=torch.float32)
    row = matrix.row_scale.numpy()
    negative = row if matrix.row_scale_neg is None else matrix.row_scale_neg.numpy()
    out, shared, col = weights.numpy(), _shared(tables, matrix), matrix.col_scale.numpy()
    _over_rows(matrix, lambda lo, hi: dense_rows(*shared, lo, hi, row, negative, col, out))
    return weights.to(dtype)


def matvec(tables: Tables, matrix: ParsedMatrix, x: Tensor) -> Tensor:
    """``x @ W.T`` with W decoded inside the product: [n, cols] -> float32 [n, rows], for small n.

    Raises:
        ValueError: x is not float32 [n, cols] on the CPU.
    """
    shape = tuple(x.shape)
    if x.dtype != torch.float32 or shape[1:] != (matrix.cols,) or x.device.type != "cpu":
        raise ValueError(
            f"x must be float32 [n, {matrix.cols}] on the CPU, got {x.dtype} {shape} on {x.device}"
        )
    n = x.shape[0]
    if n == 1:
        return matvec_pairs([(tables, matrix)], x)
    scaled = torch.zeros(n, matrix.cols + 1)
    torch.mul(x, matrix.col_scale, out=scaled[:, :-1])
    by_slot = scaled[:, matrix.slots.long()]  # [n, pieces, span + 1]
    gathered = by_slot.permute(1, 2, 0).contiguous().numpy()
    split = matrix.row_scale_neg is not None
    sums = np.zeros((2, matrix.rows, n), np.float32)
    shared = _shared(tables, matrix)[:-1]
    if n:
        _over_rows(matrix, lambda lo, hi: matvec_rows_batch(*shared, lo, hi, gathered, split, sums))
    total, below = torch.from_numpy(sums[0]), torch.from_numpy(sums[1])
    y = total * matrix.row_scale[:, None]
    if matrix.row_scale_neg is not None:
        y += below * (matrix.row_scale_neg - matrix.row_scale)[:, None]
    return y.T.contiguous()


def _shared(tables: Tables, matrix: ParsedMatrix) -> tuple[Any, ...]:
    """Arguments common to the loops; the last is `slots`."""
    words, start, row_class, slot_class, slots = matrix.arrays
    last = words.size - PADDING_WORDS
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
