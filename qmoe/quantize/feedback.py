"""Error feedback along columns (GPTQ, Frantar et al. 2022, arXiv 2210.17323) onto a scaled integer grid.

    for j in columns:
        q[:, j] = clamp(round(w[:, j] / step[:, j]), low, high)
        error   = (w[:, j] - q[:, j] * step[:, j]) / U[j, j]
        w[:, j + 1 :] -= error * U[j, j + 1 :]

in blocks of columns: inside a block column by column, behind it one matrix product per block. Everything is kept
transposed, [E, cols, rows], so that the inner loop runs along rows, which are independent: on the CPU it is a compiled
kernel that vectorises over rows, elsewhere the torch loop. Both round every operation the same way, so they agree
bit for bit; only the matrix product between blocks may differ between devices or BLAS builds.
"""

from dataclasses import dataclass

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 64  # columns; 64 x 64 float32 of U fit in the first-level cache beside a tile of rows
TILE = 64  # rows that one thread takes at a time


@dataclass(frozen=True)
class Grid:
    """The representable values of every element: ``q * col[j] * row``, low <= q <= high, q integer.

    Attributes:
        col: float32 [E, cols], > 0.
        row: float32 [E, rows], > 0, for values >= 0.
        row_neg: float32 [E, rows], > 0, for negative values; `row` itself if the grid is symmetric.
        low: float32 [E, rows], smallest integer, >= -128.
        high: float32 [E, rows], largest integer, <= 127.
    """

    col: Tensor
    row: Tensor
    row_neg: Tensor
    low: Tensor
    high: Tensor

    @staticmethod
    def symmetric(col: Tensor, row: Tensor, limit: int = 127) -> "Grid":
        """Integers in [-limit, limit]."""
        high = torch.full_like(row, limit)
        return Grid(col, row, row, -high, high)


def round_to_grid(weight: Tensor, grid: Grid) -> Tensor:
    """Nearest integers without feedback: float32 [E, rows, cols] -> int8 [E, rows, cols]."""
    row = torch.where(weight < 0, grid.row_neg[:, :, None], grid.row[:, :, None])
    q = (weight / (grid.col[:, None, :] * row)).round()
    return q.clamp(grid.low[:, :, None], grid.high[:, :, None]).to(torch.int8)


def feed_back(
    weight: Tensor, factor: Tensor, grid: Grid, *, compiled: bool | None = None
) -> Tensor:
    """Quantize column by column, pushing every column's error onto the columns behind it.

    Args:
        weight: float32 [E, rows, cols].
        factor: float [E, cols, cols], upper U of `linalg.inverse_factor`.
        grid: where to round to.
        compiled: use the compiled inner loop (CPU only); by default wherever the weights are on the CPU.

    Returns:
        int8 [E, rows, cols].
    """
    experts, rows, cols = weight.shape
    inner = (
        _block_torch
        if not (weight.device.type == "cpu" if compiled is None else compiled)
        else _block_compiled
    )
    u = factor.float()
    w = weight.transpose(1, 2).contiguous()
    codes = torch.empty(experts, cols, rows, dtype=torch.int8, device=w.device)
    for i in range(0, cols, BLOCK):
        j = min(i + BLOCK, cols)
        error = torch.empty(experts, j - i, rows, device=w.device)
        inner(w[:, i:j], u[:, i:j, i:j], grid.col[:, i:j], grid, codes[:, i:j], error)
        if j < cols:
            w[:, j:].baddbmm_(u[:, i:j, j:].transpose(1, 2), error, alpha=-1)
    return codes.transpose(1, 2).contiguous()


def _block_torch(
    w: Tensor, u: Tensor, col: Tensor, grid: Grid, codes: Tensor, error: Tensor
) -> None:
    """One block of columns; w, codes, error are [E, block, rows] and written in place. This is the definition."""
    for k in range(w.shape[1]):
        v = w[:, k]
        step = col[:, k, None] * torch.where(v < 0, grid.row_neg, grid.row)
        q = (v / step).round().clamp(grid.low, grid.high)
        step = col[:, k, None] * torch.where(q < 0, grid.row_neg, grid.row)
        e = (v - q * step) / u[:, k, k, None]
        w[:, k + 1 :] -= u[:, k, k + 1 :, None] * e[:, None]
        codes[:, k] = q.to(torch.int8)
        error[:, k] = e


def _block_compiled(
    w: Tensor, u: Tensor, col: Tensor, grid: Grid, codes: Tensor, error: Tensor
) -> None:
    _block_kernel(
        w.numpy(),
        np.ascontiguousarray(u.numpy()),
        col.numpy(),
        grid.row.numpy(),
        grid.row_neg.numpy(),
        grid.low.numpy(),
        grid.high.numpy(),
        codes.numpy(),
        error.numpy(),
    )


@numba.njit(parallel=True, cache=True, error_model="numpy")
def _block_kernel(
    w: NDArray[np.float32],
    u: NDArray[np.float32],
    col: NDArray[np.float32],
    row: NDArray[np.float32],
    row_neg: NDArray[np.float32],
    low: NDArray[np.float32],
    high: NDArray[np.float32],
    codes: NDArray[np.int8],
    error: NDArray[np.float32],
) -> None:
    experts, block, rows = w.shape
    tiles = (rows + TILE - 1) // TILE
    for t in numba.prange(experts * tiles):
        e, first = t // tiles, t % tiles * TILE
        n = min(TILE, rows - first)
        tile = np.empty((block, TILE), dtype=np.float32)
        err = np.empty(TILE, dtype=np.float32)
        tile[:, :n] = w[e, :, first : first + n]
        for k in range(block):
            diagonal = u[e, k, k]
            c = col[e, k]
            for r in range(n):
                v = tile[k, r]
                step = c * (row_neg[e, first + r] if v < 0 else row[e, first + r])
                q = min(max(np.rint(v / step), low[e, first + r]), high[e, first + r])
                step = c * (row_neg[e, first + r] if q < 0 else row[e, first + r])
                err[r] = (v - q * step) / diagonal
                codes[e, k, first + r] = np.int8(q)
                error[e, k, first + r] = err[r]
            for m in range(k + 1, block):
                f = u[e, k, m]
                for r in range(n):
                    tile[m, r] -= f * err[r]
