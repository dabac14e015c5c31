"""Rate-distortion quantizer: entropy-coded integers whose steps follow what the loss feels.

Per expert, with H = sum g^2 x x^T over its tokens (x the quantized model's inputs, g the routing
weight), P what damping and the layer's Hessian add to it, and U^T U = (H + P)^-1:

1. Waterfilling (WaterSIC, arXiv 2603.04956): column j gets the step delta * U_jj. One delta for
   every column, expert, projection and layer; unimportant columns fall to zero bits by themselves.
2. Drift (Qronos, arXiv 2505.11695): the target is W (C + P)(H + P)^-1, C the cross product with the
   original model's inputs, so that errors of the layers before are undone where possible. The last
   projection also makes good what the residual stream has lost, R = sum g^2 r x^T: + R (H + P)^-1.
3. Error feedback with plain rounding, important columns last; no dead zone, which would bias the
   output towards zero.

Scales are rounded to the grid before integers are chosen, so the integers compensate the rounding.
docs/log-quant.md has the measurements behind the defaults, and what was tried and lost.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qmoe.quantize.feedback import Grid, feed_back, round_to_grid
from qmoe.quantize.linalg import damped, inverse_factor, shrunk, times_upper, times_upper_t
from qmoe.quantize.types import Method, Problem, Solution
from qmoe.types import QuantizedMatrix, grid_index, grid_scale

LARGEST = 100.0  # |q| of the largest weight of a column; error feedback may add to it, up to 127


@dataclass(frozen=True)
class Options:
    """Knobs of the solver.

    Attributes:
        delta: global step in units of the loss; larger means fewer bits.
        drift: share of the way to the original model's inputs for the target.
        damping: share of the mean diagonal added to the Hessian.
        shrinkage: share of the layer's Hessian, normalised to the expert's, that is added to that
            of an expert with one token for each column; with n times the tokens 1 / n of it.
        col_step, row_step: coarseness of the scale grids; 64 is an octave.
        fit_rows: least-squares row scales at the end; without them all row scales are 1.
        waterfill: steps follow U_jj; without it all columns of a matrix share the geometric mean.
        ascending: columns are quantized from the smallest diagonal of H to the largest, so that
            fine steps absorb what coarse ones left; else in their natural order.
        feedback: errors of a column are pushed onto the columns behind it.
    """

    delta: float
    drift: float = 1.0
    damping: float = 0.1
    shrinkage: float = 1.0
    col_step: int = 16
    row_step: int = 4
    fit_rows: bool = False
    waterfill: bool = True
    ascending: bool = True
    feedback: bool = True

    def __post_init__(self) -> None:
        low = min(self.damping, self.shrinkage)
        if not self.delta > 0 or not 0 <= self.drift <= 1 or low < 0:
            raise ValueError(f"rd options out of range: {self}")


def solve(problem: Problem, options: Options) -> Solution:
    """Quantizes all experts of a problem; one without tokens is solved with its layer's Hessian.

    Args:
        problem: `hessian` weighted by the squared routing weight; `cross` is needed for drift > 0.
        options: solver_options.

    Raises:
        ValueError: drift is asked for but the problem has no cross product.
    """
    evidence, notes = _evidence(problem)
    h, own = regular(problem, evidence, options)
    order = _order(h, options)
    factor, singular = inverse_factor(_both_ways(h, order))
    notes = [", ".join(filter(None, pair)) for pair in zip(notes, singular, strict=True)]
    target = _target(problem, options.drift * own, factor, order)

    delta = options.delta / problem.importance**0.5
    # a heavy column at a high rate must not leave int8
    fine = factor.diagonal(dim1=-2, dim2=-1)
    if not options.waterfill:
        fine = fine.log().mean(1, keepdim=True).exp().expand_as(fine)
    step = torch.maximum(delta * fine, target.abs().amax(1) / LARGEST)
    col_index = grid_index(step, options.col_step)
    col = grid_scale(col_index)
    grid = Grid.symmetric(col, torch.ones_like(target[:, :, 0]))
    codes = feed_back(target, factor, grid) if options.feedback else round_to_grid(target, grid)
    back = torch.argsort(order, dim=1)
    codes, target = _columns(codes, back), _columns(target, back)
    col, col_index = col.gather(1, back), col_index.gather(1, back)
    row_index = torch.zeros(target.shape[:2], dtype=torch.int16, device=target.device)
    if options.fit_rows:
        row_index = grid_index(_row_fit(target, evidence, codes, col), options.row_step)
    return Solution(
        [
            QuantizedMatrix(q.contiguous(), r.contiguous(), c.contiguous())
            for q, r, c in zip(codes.cpu(), row_index.cpu(), col_index.cpu(), strict=True)
        ],
        notes,
    )


def regular(problem: Problem, evidence: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Hessians H + P that can be inverted, float64 [E, cols, cols], and the part [E] of each that
    is its own: the fewer tokens a column has, the more is the layer's.
    """
    tokens = problem.tokens.to(evidence.device).double().clamp(min=1)
    share = options.shrinkage * evidence.shape[-1] / tokens
    if problem.layer_hessian is None:
        share = torch.zeros_like(share)
    return damped(shrunk(evidence, problem.layer_hessian, share), options.damping), 1 / (1 + share)


def _evidence(problem: Problem) -> tuple[Tensor, list[str]]:
    """Hessians; where an expert has no token, what one token of the layer's average kind gives."""
    h = problem.hessian.double().clone()
    notes = [""] * len(h)
    for e in (problem.tokens == 0).nonzero().flatten().tolist():
        if problem.layer_hessian is None or problem.layer_tokens == 0:
            notes[e] = "no tokens in the layer: columns on equal terms"
            h[e] = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
        else:
            notes[e] = "no tokens: layer's Hessian used"
            h[e] = problem.layer_hessian.to(h) / problem.layer_tokens
    return h, notes


def _order(h: Tensor, options: Options) -> Tensor:
    """Columns [E, cols] in the order in which they are quantized. Sizes are rounded to a 1/16
    octave, so that how sums were rounded, by the number of threads say, decides no order.
    """
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    if options.ascending:
        size = (16 * diagonal.clamp_min(torch.finfo(h.dtype).tiny).log2()).round()
        return torch.argsort(size, dim=1, stable=True)
    return torch.arange(h.shape[-1], device=h.device).expand_as(diagonal)


def _columns(t: Tensor, order: Tensor) -> Tensor:
    """Matrices [E, rows, cols] with their columns in another order [E, cols]."""
    return t.gather(2, order[:, None, :].expand_as(t))


def _both_ways(t: Tensor, order: Tensor) -> Tensor:
    """Square matrices [E, cols, cols] with rows and columns in another order [E, cols]."""
    return _columns(t.gather(1, order[:, :, None].expand_as(t)), order)


def _target(problem: Problem, drift: Tensor, factor: Tensor, order: Tensor) -> Tensor:
    """``W + drift * (W (C - H) + R)(H + P)^-1`` in float32, R what is owed, columns in the order of
    the factor, which is of H + P; P cancels in C - H.
    """
    w = _columns(problem.weight, order)
    if not drift.any():
        return w
    if problem.cross is None:
        raise ValueError("drift correction needs Problem.cross")
    part = drift[:, None, None]
    difference = part * (problem.cross.double() - problem.hessian.double())
    d, u = _both_ways(difference.float(), order), factor.float()
    if problem.owed is not None:
        owed = _columns((part * problem.owed.double()).float(), order)
        return w + times_upper(times_upper_t(torch.baddbmm(owed, w, d), u), u)
    if w.shape[1] < w.shape[2]:  # the cheaper order of the same products
        return w + times_upper(times_upper_t(w @ d, u), u)
    return torch.baddbmm(w, w, times_upper(times_upper_t(d, u), u))


def _row_fit(target: Tensor, hessian: Tensor, codes: Tensor, col: Tensor) -> Tensor:
    """Row factors t, [E, rows], that minimize ``(target - t w_hat) H (target - t w_hat)^T``."""
    w = codes.float() * col[:, None, :]
    hw = torch.bmm(w, hessian.float())
    fit = (target * hw).sum(2) / (w * hw).sum(2)
    return torch.where(fit.isfinite(), fit, 1.0).clamp(0.5, 2.0)


def method(
    delta: float = 8.0, weighted: float = True, least_use: float = 0.05, **solver_options: float
) -> Method:
    """The `rd` method.

    Args:
        delta: see `Options`.
        weighted: Hessians are weighted by the squared routing weight.
        least_use: see `Method`.
        solver_options: other fields of `Options`.
    """
    options = Options(delta, **solver_options)  # type: ignore[arg-type]
    if not 0 <= least_use <= 1:
        raise ValueError(f"least_use is {least_use:g}, a share between 0 and 1")
    run = partial(solve, options=options)
    return Method(f"rd(delta={delta:g})", bool(weighted), options.drift, run, least_use)
