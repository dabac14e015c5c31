"""Frozen values that flow between the layers. They know nothing about files or models.

Scales live on a grid like that of a float with six bits of mantissa: index k means
``(1 + (k mod 64) / 64) * 2 ** (k div 64)``; `grid_scale` is the one definition. Indices cost few
bits, every implementation gets the same float32, and a small integer times a scale is exact in
bfloat16 (any |q| <= 36 on the quarter octaves that the rd method uses), so that a checkpoint
exported in bfloat16 is the same model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_STEPS = 64  # per octave
SCALE_MIN, SCALE_MAX = -2048, 2047  # 2^-32 .. just under 2^32


def grid_scale(k: Tensor) -> Tensor:
    """Scales of grid indices.

    Args:
        k: integer tensor of any shape, values in [SCALE_MIN, SCALE_MAX].

    Returns:
        float32 tensor of the same shape, exact: (1 + (k mod 64) / 64) * 2 ** (k div 64).
    """
    # The low six bits are the top of the mantissa, the rest is the exponent.
    return ((k.int() + 127 * SCALE_STEPS) << 17).view(torch.float32)


def grid_index(scale: Tensor, step: int = 1) -> Tensor:
    """Nearest grid index of positive scales, in multiples of `step`; zeros get the smallest.

    Args:
        scale: float tensor, finite, >= 0.
        step: coarseness, a divisor of 64 (64 is one octave) or a multiple of it. Coarser indices
            cost fewer stored bits.

    Returns:
        int16 tensor of the same shape, clamped to the representable range.
    """
    tiny = 2.0 ** (SCALE_MIN / SCALE_STEPS)
    mantissa, octave = torch.frexp(scale.double().clamp_min(tiny))  # mantissa in [0.5, 1)
    exact = (octave.double() - 1 + 2 * mantissa - 1) * SCALE_STEPS
    k = torch.round(exact / step) * step
    low = -(SCALE_MIN // -step) * step  # multiples of the step inside the range
    high = SCALE_MAX // step * step
    return k.clamp(low, high).to(torch.int16)


@dataclass(frozen=True)
class QuantizedMatrix:
    """Integers and scales of one matrix [rows, cols] (rows are outputs).

    ``w_hat[i, j] = codes[i, j] * grid_scale(col_scale[j]) * grid_scale(row[i])`` in float32,
    multiplied in that order, where ``row`` is `row_scale_neg` for negative codes if that is
    present, else `row_scale`.

    Attributes:
        codes: int8 [rows, cols].
        row_scale: int16 [rows], grid indices.
        col_scale: int16 [cols], grid indices.
        row_scale_neg: int16 [rows] or None; only asymmetric ternary grids (QMoE, round to nearest)
            need it.
    """

    codes: Tensor
    row_scale: Tensor
    col_scale: Tensor
    row_scale_neg: Tensor | None = None

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or self.codes.dtype != torch.int8:
            raise ValueError(
                f"codes must be int8 [rows, cols], got {self.codes.dtype} {tuple(self.codes.shape)}"
            )
        rows, cols = self.codes.shape
        for name, t, n in (
            ("row_scale", self.row_scale, rows),
            ("col_scale", self.col_scale, cols),
            ("row_scale_neg", self.row_scale_neg, rows),
        ):
            if t is not None and (t.dtype != torch.int16 or t.shape != (n,)):
                raise ValueError(f"{name} must be int16 [{n}], got {t.dtype} {tuple(t.shape)}")

    def dequantize(self) -> Tensor:
        """The float32 matrix [rows, cols] that every decoder must reproduce bit for bit."""
        w = self.codes.float() * grid_scale(self.col_scale)
        row = grid_scale(self.row_scale)[:, None]
        if self.row_scale_neg is None:
            return w * row
        return w * torch.where(self.codes < 0, grid_scale(self.row_scale_neg)[:, None], row)


@dataclass(frozen=True)
class ProjectionShape:
    """One matrix that every expert of a module has.

    Attributes:
        name: "gate_up", "up", "down", or "weight" for modules that hold a single projection.
        rows: outputs.
        cols: inputs.
        inner: True if its input is the expert's activation (the recorded value), False if it is
            the expert's input.
    """

    name: str
    rows: int
    cols: int
    inner: bool


@dataclass(frozen=True)
class ExpertsLayout:
    """One experts module of one model.

    Attributes:
        path: module path in the transformers model, e.g. "model.layers.0.mlp.experts".
        kind: name of its kind, see `qmoe.models.families.kind`.
        experts: number of experts.
        projections: the matrices of every expert, in the order in which they are stored.
    """

    path: str
    kind: str
    experts: int
    projections: tuple[ProjectionShape, ...]

    @property
    def weights(self) -> int:
        """Number of expert weights in this module."""
        return self.experts * sum(p.rows * p.cols for p in self.projections)
