"""The sum of what a token's experts say, without intermediate tensors."""

import numba as nb
import numpy as np
import torch
from torch import Tensor

from qmoe.codec.decoder import threads
from qmoe.codec.format.arrays import F32, I64, U16, U32

_SHARE = 256  # columns of a piece of work


def add_rows(out: Tensor, rows: Tensor, y: Tensor, weights: Tensor | None) -> None:
    """``out[rows[i]] += (y[i] * weights[i]).float()`` for every i in turn, the product rounded to
    the dtype of y.

    Args:
        out: float32 [n, width], changed in place.
        rows: int64 [m].
        y: [m, width].
        weights: [m], of the dtype of y, or None for 1.
    """
    kinds = (torch.float32, torch.bfloat16)
    known = y.dtype in kinds and (weights is None or weights.dtype == y.dtype)
    if not known or y.device.type != "cpu" or y.requires_grad or out.requires_grad:
        terms = y if weights is None else y * weights[:, None]
        out.index_add_(0, rows, terms.float())
        return
    bits = torch.uint16 if y.dtype == torch.bfloat16 else torch.uint32
    plain = torch.ones(len(y), dtype=y.dtype) if weights is None else weights.detach().contiguous()
    halves = y.detach().contiguous().view(bits).numpy()
    arguments = (out.numpy(), rows.numpy(), halves, plain.view(bits).numpy())
    threads.run(_alone, _shared, arguments, y.numel())


@nb.njit(cache=True, nogil=True)
def _alone(out: F32, rows: I64, y: U16 | U32, weights: U16 | U32) -> None:
    _add(out, rows, y, weights, 0, out.shape[1])


@nb.njit(cache=True, nogil=True, parallel=True)
def _shared(out: F32, rows: I64, y: U16 | U32, weights: U16 | U32) -> None:
    width = out.shape[1]
    for t in nb.prange((width + _SHARE - 1) // _SHARE):
        _add(out, rows, y, weights, t * _SHARE, min((t + 1) * _SHARE, width))


@nb.njit(cache=True, nogil=True)
def _add(out: F32, rows: I64, y: U16 | U32, weights: U16 | U32, first: int, end: int) -> None:
    """A float32 or the upper half of one is told by its size."""
    line = np.empty(end - first, np.uint32)
    floats = line.view(np.float32)
    shift = np.uint32(32 - 8 * y.itemsize)
    for i in range(rows.size):
        to, by = out[rows[i], first:end], np.empty(1, np.uint32)
        by[0] = np.uint32(weights[i]) << shift
        weight = by.view(np.float32)[0]
        for k in range(line.size):
            line[k] = np.uint32(y[i, first + k]) << shift
        for k in range(line.size):
            floats[k] *= weight
        if shift:  # rounded to bfloat16: the nearest, ties to even
            for k in range(line.size):
                odd = (line[k] >> np.uint32(16)) & np.uint32(1)
                line[k] = (line[k] + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)
        for k in range(line.size):
            to[k] += floats[k]
