"""Dense matrices (attention, shared experts, embeddings, head) at a few bits per weight.

The pieces of `rd` at a higher rate: waterfilled steps from the Cholesky factor of the inputs'
Hessian and error feedback. A table that is looked up has no Hessian: its rows get steps in
proportion to their size, since the norms behind an embedding make its direction matter.

Integers have 8 bits. Rates that need more take a second plane: the first is rounded without
feedback, and what is left goes to the second with a 16th of the step.

Knows nothing about files, models or how integers are stored.
"""

import math

import torch
from torch import Tensor

from qmoe.quantize.feedback import Grid, feed_back, round_to_grid
from qmoe.quantize.linalg import damped, inverse_factor
from qmoe.types import SCALE_MAX, SCALE_MIN, SCALE_STEPS, QuantizedMatrix, grid_index, grid_scale

DAMPING = 0.01  # of the mean diagonal: every matrix sees all tokens, unlike an expert
LARGEST = 100.0  # as in rd
ONE_PLANE = 5.0  # bits per weight that 8-bit integers hold with room for heavy columns
_FINER = 4 * SCALE_STEPS  # step of the second plane: a 16th
_COL_STEP, _ROW_STEP = 16, 8  # coarseness of the scale grids; 64 is an octave
_SMALLEST_ROW = 0.1  # of the median row: rows below it are treated as if they were that large


class DenseSolver:
    """Quantizes bands of rows of one matrix at any step."""

    def __init__(self, weight: Tensor, hessian: Tensor | None, bits: float) -> None:
        """Factors the Hessian.

        Args:
            weight: float32 [rows, cols]; y = x W^T, or a table whose rows are looked up.
            hessian: float64 [cols, cols], sum of x x^T; None if it is a table or nothing is known.
            bits: that are aimed at; decides the number of planes.
        """
        self.weight, self.bits = weight, bits
        self.planes = 1 if bits <= ONE_PLANE else 2
        self.note = ""
        rows, cols = weight.shape
        self._factor: Tensor | None = None
        self._col_step = _COL_STEP
        unit = torch.ones(cols, dtype=torch.float64, device=weight.device)
        self._row = torch.zeros(rows, dtype=torch.int16, device=weight.device)
        if hessian is not None and hessian.diagonal().sum() > 0:
            h = damped(hessian[None] / hessian.diagonal().mean(), DAMPING)
            if self.planes == 1:
                self._factor, notes = inverse_factor(h)
                self.note = notes[0]
                unit = self._factor[0].diagonal()
            else:
                unit = h[0].diagonal().rsqrt()
            unit = unit / unit.log().mean().exp()
        elif hessian is None:
            size = weight.square().mean(1).sqrt()
            self._col_step = 1  # all columns have one step, nothing else tunes the rate
            self._row = grid_index(size.clamp_min(_SMALLEST_ROW * size.median()), _ROW_STEP)
        else:
            self.note = "no inputs seen: rounded on equal terms"
        self._unit = unit

    def first_step(self) -> float:
        """The step that meets the target if the scaled weights are Gaussian."""
        scaled = self.weight.double() / (grid_scale(self._row).double()[:, None] * self._unit)
        rms = max(float(scaled.square().mean().sqrt()), 1e-30)
        return rms * math.sqrt(2 * math.pi * math.e) / 2**self.bits

    def solve(self, rows: Tensor | slice, delta: float) -> list[QuantizedMatrix]:
        """Planes of some rows, on the CPU; their values add up to the rows.

        Args:
            rows: which.
            delta: global step.
        """
        weight, row_index = self.weight[rows][None], self._row[rows][None]
        row = grid_scale(row_index)
        shift = _FINER * (self.planes - 1)
        largest = (weight.abs() / row[:, :, None]).amax(1)
        step = torch.maximum(self._unit * (delta * 2 ** (shift / SCALE_STEPS)), largest / LARGEST)
        col_index = grid_index(step.clamp(max=2.0 ** (SCALE_MAX // SCALE_STEPS)), self._col_step)
        grid = Grid.symmetric(grid_scale(col_index), row)
        if self._factor is None:
            codes = round_to_grid(weight, grid)
        else:
            codes = feed_back(weight, self._factor, grid)
        out = [_matrix(codes, row_index, col_index)]
        if self.planes == 2:
            left = weight - out[0].dequantize().to(weight.device)
            finer = (col_index - _FINER).clamp_min(SCALE_MIN).to(torch.int16)
            codes = round_to_grid(left, Grid.symmetric(grid_scale(finer), row))
            out.append(_matrix(codes, row_index, finer))
        return out


def _matrix(codes: Tensor, row: Tensor, col: Tensor) -> QuantizedMatrix:
    return QuantizedMatrix(*(t[0].cpu().contiguous() for t in (codes, row, col)))
