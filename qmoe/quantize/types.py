"""What a solver gets and gives: a batch of expert matrices of one projection of one layer.

Knows nothing about files, models or how integers are stored.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qmoe.errors import NonFiniteError
from qmoe.types import QuantizedMatrix


@dataclass(frozen=True)
class Problem:
    """E matrices that are quantized together, with the statistics of what flows through them.

    Attributes:
        weight: float32 [E, rows, cols]; rows are outputs, ``y = x @ weight[e].T``.
        hessian: float [E, cols, cols], sum over the expert's tokens of g^2 x x^T. x is the input in
            the quantized model, g the routing weight if the method is `weighted`, else 1. Sums, not
            means: an expert that is used twice as often matters twice as much.
        tokens: int64 [E], tokens that each expert saw.
        layer_hessian: float [cols, cols], the sum of all experts' Hessians of the layer (also of
            those in other batches), or None where there is only one matrix.
        layer_tokens: tokens behind `layer_hessian`, summed over experts.
        cross: float [E, cols, cols] or None, sum of g^2 x_orig x^T over the same tokens, x_orig the
            input of the
            same token in the original model: rows are original, columns quantized.
        importance: what a squared output error of this layer costs relative to the other layers.
        owed: float [E, rows, cols] or None, sum of g^2 r x^T: what the outputs should make good
            besides, r each expert's share of it.
    """

    weight: Tensor
    hessian: Tensor
    tokens: Tensor
    layer_hessian: Tensor | None = None
    layer_tokens: int = 0
    cross: Tensor | None = None
    importance: float = 1.0
    owed: Tensor | None = None

    def __post_init__(self) -> None:
        if self.weight.ndim != 3 or self.weight.dtype != torch.float32:
            got = f"{self.weight.dtype} {tuple(self.weight.shape)}"
            raise ValueError(f"weight must be float32 [E, rows, cols], got {got}")
        experts, rows, cols = self.weight.shape
        for name, t, shape in (
            ("hessian", self.hessian, (experts, cols, cols)),
            ("tokens", self.tokens, (experts,)),
            ("layer_hessian", self.layer_hessian, (cols, cols)),
            ("cross", self.cross, (experts, cols, cols)),
            ("owed", self.owed, (experts, rows, cols)),
        ):
            if t is not None and tuple(t.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
        for name, t in (
            ("weight", self.weight),
            ("Hessian", self.hessian),
            ("drift cross product", self.cross),
        ):
            if t is not None:
                require_finite(t, name)
        if self.layer_hessian is not None and not self.layer_hessian.isfinite().all():
            raise NonFiniteError("the layer's Hessian has NaN or Inf")


def require_finite(t: Tensor, name: str) -> None:
    """Raises NonFiniteError that names the first expert of `t` [E, ...] with NaN or Inf."""
    # a sum is finite only if every term is; the exact search runs only on suspicion
    if t.sum(dtype=torch.float64).isfinite():
        return
    bad = (~t.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        count = f"{len(bad)} of {len(t)} experts"
        raise NonFiniteError(f"{name} of expert {bad[0]} has NaN or Inf ({count})")


@dataclass(frozen=True)
class Solution:
    """Quantized matrices in the order of the problem.

    Attributes:
        matrices: one per expert.
        notes: one per expert; "" if nothing was unusual, else what was done, e.g. "no tokens:
            rounded".
    """

    matrices: list[QuantizedMatrix]
    notes: list[str]

    def __post_init__(self) -> None:
        if len(self.matrices) != len(self.notes):
            raise ValueError(f"{len(self.matrices)} matrices but {len(self.notes)} notes")


@dataclass(frozen=True)
class Method:
    """A way to quantize.

    Attributes:
        name: as on the command line, with parameters, for the report.
        weighted: Hessians are weighted by the squared routing weight.
        drift: share of the way from the quantized model's inputs to the original's for the target;
            0 means that `Problem.cross` is not needed.
        solve: Problem -> Solution; deterministic, runs on the device of the problem's tensors.
        least_use: share of what an expert would see if all were used alike; one that sees less
            learns from tokens of the layer that were routed elsewhere, up to that share.
    """

    name: str
    weighted: bool
    drift: float
    solve: Callable[[Problem], Solution]
    least_use: float = 0.0
