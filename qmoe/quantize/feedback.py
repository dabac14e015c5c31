"""Error feedback along columns (GPTQ, arXiv 2210.17323) onto a scaled integer grid.

    for j in columns:
        q[:, j] = clamp(round(w[:, j] / step[:, j]), low, high)
        error   = (w[:, j] - q[:, j] * step[:, j]) / U[j, j]
        w[:, j + 1 :] -= error * U[j, j + 1 :]

in blocks of columns: inside a block column by column, behind it one matrix product per block.
Everything is kept transposed, [E, cols, rows], so that the inner loop runs along rows, which are
independent: on the CPU it is a compiled kernel that vectorises over rows, elsewhere the torch loop.
Both round every operation the same way, so they agree bit for bit; only the matrix product between
blocks may differ between devices or BLAS builds.
"""

from dataclasses import dataclass

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 64  # columns; of a block; 64 x 64 float32 of U fit in the first-level cache
TILE = 128  # rows that one thread takes at a time


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
        compiled: use the compiled inner loop (CPU only); by default wherever the weights are on the
            CPU.

    Returns:
        int8 [E, rows, cols].
    """
    experts, rows, cols = weight.shape
    on_cpu = weight.device.type == "cpu"
    inner = _block_compiled if (on_cpu if compiled is None else compiled) else _block_torch
    u = factor.float().contiguous()
    w = weight.transpose(1, 2).clone(memory_format=torch.contiguous_format)  # it changes
    codes = torch.empty(experts, cols, rows, dtype=torch.int8, device=w.device)
    for i in range(0, cols, BLOCK):
        j = min(i + BLOCK, cols)
        error = torch.empty(experts, j - i, rows, device=w.device)
        inner(w, u, grid, codes, error, i)
        if j < cols:
            w[:, j:].baddbmm_(u[:, i:j, j:].transpose(1, 2), error, alpha=-1)
    return codes.transpose(1, 2).contiguous()


def _block_torch(w: Tensor, u: Tensor, grid: Grid, codes: Tensor, error: Tensor, i: int) -> None:
    """The block of columns that starts at i; writes codes [E, cols, rows], error [E, block, rows].

    Only this block of w [E, cols, rows] changes. This is the definition.
    """
    j = i + error.shape[1]
    for k in range(i, j):
        v, col = w[:, k], grid.col[:, k, None]
        q = (v / (col * torch.where(v < 0, grid.row_neg, grid.row))).round()
        q = q.clamp(grid.low, grid.high)
        e = (v - q * (col * torch.where(q < 0, grid.row_neg, grid.row))) / u[:, k, k, None]
        w[:, k + 1 : j] -= u[:, k, k + 1 : j, None] * e[:, None]
        codes[:, k] = q.to(torch.int8)
        error[:, k - i] = e


def _block_compiled(w: Tensor, u: Tensor, grid: Grid, codes: Tensor, error: Tensor, i: int) -> None:
    scales = (grid.col, grid.row, grid.row_neg, grid.low, grid.high)
    arrays = (t.contiguous().numpy() for t in (w, u, *scales, codes, error))
    _block_kernel(*arrays, i)


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
    i: int,
) -> None:
    experts, block, rows = error.shape
    tiles = (rows + TILE - 1) // TILE
    for t in numba.prange(experts * tiles):
        e, first = t // tiles, t % tiles * TILE
        n = min(TILE, rows - first)
        tile = np.empty((block, n), dtype=np.float32)
        tile[:] = w[e, i : i + block, first : first + n]
        err = np.empty((block, n), dtype=np.float32)
        limits = np.empty((4, n), dtype=np.float32)
        limits[0], limits[1] = row_neg[e, first : first + n], row[e, first : first + n]
        limits[2], limits[3] = low[e, first : first + n], high[e, first : first + n]
        _solve_tile(tile, err, u[e, i : i + block, i : i + block], col[e, i : i + block], limits)
        error[e, :, first : first + n] = err
        codes[e, i : i + block, first : first + n] = tile


@numba.njit(cache=True, error_model="numpy")
def _solve_tile(
    tile: NDArray[np.float32],
    errors: NDArray[np.float32],
    u: NDArray[np.float32],
    col: NDArray[np.float32],
    limits: NDArray[np.float32],
) -> None:
    """Columns [block, n] become integers, `errors` their errors over the diagonal.

    The loops over r are vectorised, eightfold faster, only because they run over row views and load
    every operand before it is used.
    """
    rows_neg, rows, lows, highs = limits[0], limits[1], limits[2], limits[3]
    for k in range(tile.shape[0]):
        v, err = tile[k], errors[k]
        c, diagonal = col[k], u[k, k]
        for r in range(len(v)):
            x, negative, positive = v[r], rows_neg[r], rows[r]
            low, high = lows[r], highs[r]
            q = np.rint(x / (c * (negative if x < np.float32(0) else positive)))
            q = min(max(q, low), high)
            err[r] = (x - q * (c * (negative if q < np.float32(0) else positive))) / diagonal
            v[r] = q
        for m in range(k + 1, tile.shape[0]):
            behind, factor = tile[m], u[k, m]
            for r in range(len(behind)):
                behind[r] -= factor * err[r]
