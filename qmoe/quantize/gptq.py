"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): a clipped asymmetric grid a row, for reference."""

from functools import partial

import torch
from torch import Tensor

from qmoe.quantize.feedback import Grid, feed_back, round_to_grid
from qmoe.quantize.linalg import damped, inverse_factor
from qmoe.quantize.types import Method, Problem, Solution
from qmoe.types import QuantizedMatrix, grid_index, grid_scale

CLIPS = 13  # tried shares of the row's range, from 0.4 to 1


def clipped_grid(weight: Tensor, bits: int) -> tuple[Grid, Tensor]:
    """Per row, scale and zero point of 2^bits levels with the least squared error over CLIPS clips.

    Args:
        weight: float32 [E, rows, cols].
        bits: 2 to 7; integers are stored less their zero point.

    Returns:
        The grid and its row scale indices, int16 [E, rows].
    """
    top = 2**bits - 1
    low, high = weight.amin(2).clamp_max(0), weight.amax(2).clamp_min(0)
    col = torch.ones(weight.shape[0], weight.shape[2], device=weight.device)
    best = torch.full_like(low, torch.inf)
    index = torch.zeros_like(low, dtype=torch.int16)
    zero = torch.zeros_like(low)
    for share in torch.linspace(0.4, 1.0, CLIPS).tolist():
        k = grid_index((high - low) * share / top)
        scale = grid_scale(k)
        z = (-low * share / scale).round().clamp(0, top)
        grid = Grid(col, scale, scale, -z, top - z)
        error = (round_to_grid(weight, grid) * scale[:, :, None] - weight).square().sum(2)
        better = error < best
        index, zero = torch.where(better, k, index), torch.where(better, z, zero)
        best = torch.minimum(error, best)
    scale = grid_scale(index)
    return Grid(col, scale, scale, -zero, top - zero), index


def solve(problem: Problem, bits: int, damping: float) -> Solution:
    """GPTQ with natural column order; experts without tokens are rounded."""
    grid, index = clipped_grid(problem.weight, bits)
    factor, notes = inverse_factor(damped(problem.hessian, damping))
    codes = feed_back(problem.weight, factor, grid)
    starved = (problem.tokens == 0).to(codes.device)
    codes = torch.where(starved[:, None, None], round_to_grid(problem.weight, grid), codes).cpu()
    for e in starved.nonzero().flatten().tolist():
        notes[e] = "no tokens: rounded"
    col = torch.zeros(codes.shape[2], dtype=torch.int16)
    matrices = [
        QuantizedMatrix(q.contiguous(), r.contiguous(), col.clone())
        for q, r in zip(codes, index.cpu(), strict=True)
    ]
    return Solution(matrices, notes)


def method(bits: int = 2, damping: float = 0.01) -> Method:
    """The `gptq` method.

    Args:
        bits: 2 to 7 levels exponent.
        damping: share of the mean diagonal added to the Hessian.
    """
    if not 2 <= bits <= 7:
        raise ValueError(f"gptq takes 2 to 7 bits, got {bits}")
    run = partial(solve, bits=bits, damping=damping)
    return Method(f"gptq{bits}", weighted=False, drift=0.0, solve=run)
