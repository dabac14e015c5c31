"""QMoE's recipe (Frantar and Alistarh 2023, arXiv 2310.16795): GPTQ onto a ternary {row min, 0, row
max} grid.

Hessians are not weighted by the routing weight and there is no drift correction; experts that saw
no token are rounded.
"""

from functools import partial

import torch

from qmoe.quantize.feedback import feed_back, round_to_grid
from qmoe.quantize.linalg import damped, inverse_factor
from qmoe.quantize.rtn import ternary_grid, ternary_matrices
from qmoe.quantize.types import Method, Problem, Solution


def solve(problem: Problem, damping: float) -> Solution:
    """GPTQ with natural column order.

    Args:
        problem: E experts; `hessian` unweighted.
        damping: share of the mean diagonal added to the Hessian; the paper's is 0.1.
    """
    grid, row, row_neg = ternary_grid(problem.weight)
    factor, notes = inverse_factor(damped(problem.hessian, damping))
    codes = feed_back(problem.weight, factor, grid)
    starved = (problem.tokens == 0).to(codes.device)
    codes = torch.where(starved[:, None, None], round_to_grid(problem.weight, grid), codes)
    for e in starved.nonzero().flatten().tolist():
        notes[e] = "no tokens: rounded"
    return Solution(ternary_matrices(codes, row, row_neg), notes)


def method(damping: float = 0.1) -> Method:
    """The `qmoe` method."""
    return Method("qmoe", weighted=False, drift=0.0, solve=partial(solve, damping=damping))
