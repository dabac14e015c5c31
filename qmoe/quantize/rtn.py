"""Round to nearest on a ternary grid {row minimum, 0, row maximum}: uses no calibration."""

import torch
from torch import Tensor

from qmoe.quantize.feedback import Grid, round_to_grid
from qmoe.quantize.types import Method, Problem, Solution
from qmoe.types import QuantizedMatrix, grid_index, grid_scale


def ternary_grid(weight: Tensor) -> tuple[Grid, Tensor, Tensor]:
    """Row minimum and maximum, rounded to the scale grid (1/64 octave, at most 0.55 % off).

    Args:
        weight: float32 [E, rows, cols].

    Returns:
        The grid; the scale indices of the positive and of the negative level, int16 [E, rows].
    """
    high, low = weight.amax(2).clamp_min(0), -weight.amin(2).clamp_max(0)
    row, row_neg = grid_index(high), grid_index(low)
    # a row without values of a sign has no level for it
    return (
        Grid(
            torch.ones(weight.shape[0], weight.shape[2], device=weight.device),
            grid_scale(row),
            grid_scale(row_neg),
            -(low > 0).float(),
            (high > 0).float(),
        ),
        row,
        row_neg,
    )


def ternary_matrices(codes: Tensor, row: Tensor, row_neg: Tensor) -> list[QuantizedMatrix]:
    """One matrix per expert from int8 [E, rows, cols] and level indices [E, rows]."""
    col = torch.zeros(codes.shape[2], dtype=torch.int16)
    codes, row, row_neg = codes.cpu(), row.cpu(), row_neg.cpu()
    return [
        QuantizedMatrix(q.contiguous(), r.contiguous(), col.clone(), n.contiguous())
        for q, r, n in zip(codes, row, row_neg, strict=True)
    ]


def solve(problem: Problem) -> Solution:
    """Ternary rounding of every row; Hessians are not used."""
    grid, row, row_neg = ternary_grid(problem.weight)
    codes = round_to_grid(problem.weight, grid)
    notes = ["" if t else "no tokens: rounded" for t in problem.tokens.tolist()]
    return Solution(ternary_matrices(codes, row, row_neg), notes)


def method() -> Method:
    """The `rtn` method."""
    return Method("rtn", weighted=False, drift=0.0, solve=solve)
