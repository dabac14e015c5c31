"""Rate-distortion quantizer: entropy-coded integers whose steps follow what the loss feels.

Per expert, with H = sum g^2 x x^T over its tokens (x the quantized model's inputs, g the routing
weight), damped and shrunk towards the layer's mean, and U^T U = H^-1:

1. Waterfilling (WaterSIC, arXiv 2603.04956): column j gets the step delta * U_jj. One delta for
   every column, expert, projection and layer; unimportant columns fall to zero bits by themselves.
   Rows get steps 1 / sqrt(row weight).
2. Drift (Qronos, arXiv 2505.11695): the target is W (C + P)(H + P)^-1, C the cross product with the
   original model's inputs and P what was added to H, so that errors of the layers before are undone
   where possible.
3. Error feedback with plain rounding, then sweeps of coordinate descent that trade error against
   code length.
4. Row scales that fit best in the least-squares sense, on the coarse grid (off by default).

Scales are rounded to the grid before integers are chosen, so the integers compensate the rounding.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qmoe.quantize.descent import descend
from qmoe.quantize.feedback import Grid, feed_back
from qmoe.quantize.linalg import damped, inverse_factor, shrunk
from qmoe.quantize.types import Method, Problem, Solution
from qmoe.types import QuantizedMatrix, grid_index, grid_scale

LARGEST = 100.0  # |q| of the largest weight of a column; error feedback may add to it, up to 127


@dataclass(frozen=True)
class Settings:
    """Knobs of the solver; docs/log-quant.md has the measurements behind the defaults.

    Attributes:
        delta: global step in units of the loss; larger means fewer bits.
        drift: share of the way to the original model's inputs for the target.
        damping: share of the mean diagonal added to the Hessian.
        shrinkage: share of the layer's Hessian, normalised to the expert's, added to the expert's.
        prior_tokens: tokens of the layer's average kind added to every expert's Hessian.
        slope: squared error, in units of delta^2, that a bit is worth in coordinate descent.
        sweeps: passes of coordinate descent.
        col_step, row_step: coarseness of the scale grids; 64 is an octave.
        fit_rows: least-squares row scales at the end.
    """

    delta: float
    drift: float = 0.5
    damping: float = 0.1
    shrinkage: float = 0.2
    prior_tokens: float = 0.0
    slope: float = 0.0
    sweeps: int = 0
    col_step: int = 16
    row_step: int = 4
    fit_rows: bool = False
    unshrink: float = 0.0

    def __post_init__(self) -> None:
        low = min(self.damping, self.shrinkage, self.prior_tokens, self.sweeps)
        if not self.delta > 0 or not 0 <= self.drift <= 1 or low < 0:
            raise ValueError(f"rd settings out of range: {self}")


def solve(problem: Problem, settings: Settings) -> Solution:
    """Quantizes all experts of a problem; an expert without tokens is solved with its layer's
    Hessian.

    Args:
        problem: `hessian` weighted by the squared routing weight; `cross` is needed if
            `settings.drift` > 0.
        settings: knobs.

    Raises:
        ValueError: drift is asked for but the problem has no cross product.
    """
    w = problem.weight
    plain, notes = _evidence(problem, settings)
    h = damped(shrunk(plain, problem.layer_hessian, settings.shrinkage), settings.damping)
    factor, singular = inverse_factor(h)
    notes = [", ".join(filter(None, pair)) for pair in zip(notes, singular, strict=True)]
    target = _target(problem, settings, factor)

    delta = settings.delta / problem.importance**0.5
    row_index = torch.zeros(w.shape[:2], dtype=torch.int16, device=w.device)
    if problem.row_weight is not None:
        weight = problem.row_weight
        weight = weight.clamp_min(weight.mean(1, keepdim=True).clamp_min(1e-30) * 1e-4)
        row_index = grid_index(weight.rsqrt(), settings.row_step)
    # a heavy column at a high rate must not leave int8
    largest = (target.abs() / grid_scale(row_index)[:, :, None]).amax(1)
    step = torch.maximum(delta * factor.diagonal(dim1=-2, dim2=-1), largest / LARGEST)
    col_index = grid_index(step, settings.col_step)
    col, row = grid_scale(col_index), grid_scale(row_index)

    codes = feed_back(target, factor, Grid.symmetric(col, row))
    # in the units of H, an output row with the step r cares 1 / r^2 as much
    slope = (settings.slope * delta**2) * row.square()
    codes = descend(target, h, codes, col, row, slope, settings.sweeps)
    if settings.fit_rows:
        fit = _row_fit(target, plain, codes, col, row, settings.unshrink)
        row_index = grid_index(row * fit, settings.row_step)
    return Solution(_matrices(codes, row_index, col_index), notes)


def _evidence(problem: Problem, settings: Settings) -> tuple[Tensor, list[str]]:
    """Hessians with the prior's tokens, and the layer's in place of one that has none."""
    h = problem.hessian.double()
    notes = [""] * len(h)
    if problem.layer_hessian is None or problem.layer_tokens == 0:
        empty = (problem.tokens == 0).nonzero().flatten().tolist()
        for e in empty:
            notes[e] = "no tokens in the layer: rounded on equal terms"
            h[e] = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
        return h, notes
    layer = problem.layer_hessian.to(h.device).double() / problem.layer_tokens
    if settings.prior_tokens:
        h = h + settings.prior_tokens * layer
    for e in (problem.tokens == 0).nonzero().flatten().tolist():
        notes[e] = "no tokens: layer's Hessian used"
        h[e] = max(settings.prior_tokens, 1.0) * layer
    return h, notes


def _target(problem: Problem, settings: Settings, factor: Tensor) -> Tensor:
    """``W + drift * W (C - H)(H + P)^-1`` in float32; P cancels in C - H, factor is of H + P."""
    if settings.drift == 0:
        return problem.weight
    if problem.cross is None:
        raise ValueError("drift correction needs Problem.cross")
    difference = (settings.drift * (problem.cross.double() - problem.hessian.double())).float()
    u = factor.float()
    correction = torch.bmm(torch.bmm(torch.bmm(problem.weight, difference), u.mT), u)
    return problem.weight + correction


def _row_fit(
    target: Tensor, h: Tensor, codes: Tensor, col: Tensor, row: Tensor, unshrink: float
) -> Tensor:
    """Row factors t, [E, rows], that minimize ``(target - t w_hat) H (target - t w_hat)^T``."""
    w = codes.float() * col[:, None, :] * row[:, :, None]
    hw = torch.bmm(w, h.float())
    both = (target * hw).sum(2)
    fit = both / (w * hw).sum(2)
    if unshrink:
        energy = (target * torch.bmm(target, h.float())).sum(2)
        fit = fit ** (1 - unshrink) * (energy / both) ** unshrink
    return torch.where(fit.isfinite(), fit, 1.0).clamp(0.5, 2.0)


def _matrices(codes: Tensor, row_index: Tensor, col_index: Tensor) -> list[QuantizedMatrix]:
    codes, row_index, col_index = codes.cpu(), row_index.cpu(), col_index.cpu()
    return [
        QuantizedMatrix(q.contiguous(), r.contiguous(), c.contiguous())
        for q, r, c in zip(codes, row_index, col_index, strict=True)
    ]


def method(delta: float = 8.0, **knobs: float) -> Method:
    """The `rd` method; keyword arguments are fields of `Settings`."""
    settings = Settings(delta, **knobs)  # type: ignore[arg-type]
    run = partial(solve, settings=settings)
    return Method(f"rd(delta={delta:g})", weighted=True, drift=settings.drift, solve=run)
