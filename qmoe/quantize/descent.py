"""Coordinate descent on integers: whole sweeps of +-1 moves that lower error and rate together.

Error feedback decides every integer once, from the left. Afterwards each integer is looked at again
with all others known: with residual r = target - w_hat (one row) and G = r H, a move of q_j by d
changes the squared output error by

    (d s)^2 H_jj - 2 d s G_j,            s = step of the element,

and the ideal code length by that of a two-sided geometric law whose mean |q| is the product of a
row's and a column's mean (the model that the codec's contexts follow). A move is made if the sum
falls; G follows. Because the error is taken with all other integers as they are, the rate term does
not bias the output as a dead zone would.

Related: CDQuant (arXiv 2406.17542), QuantEase (arXiv 2309.01885), both without a rate.
"""

import math

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TILE = 32  # rows that one thread takes at a time
CLASSES = 64  # half octaves of the expected |q|, from 2^-20 to 2^12
CLASS_ZERO = 40  # class of expected |q| = 1


def rate_law() -> tuple[Tensor, Tensor]:
    """Bits of the first unit of |q| and of every further one, by class.

    Two-sided geometric law p(0) = 1 - e^-a, p(+-k) = e^(-2ka) sinh a; its mean |q| is
    1 / (2 sinh a).

    Returns:
        first, more: float32 [CLASSES]; bits(q) - bits(0) = first + (|q| - 1) more for q != 0.
    """
    mean = torch.exp2((torch.arange(CLASSES, dtype=torch.float64) - CLASS_ZERO) / 2)
    a = torch.asinh(0.5 / mean)
    more = 2 * a / math.log(2)
    first = more - torch.log2(torch.sinh(a)) + torch.log2(-torch.expm1(-a))
    return first.float(), more.float()


def energy_classes(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Half-octave classes of rows and columns whose sum is the class of an element's expected |q|.

    Args:
        codes: int8 [E, rows, cols].

    Returns:
        int16 [E, rows] and [E, cols].
    """
    size = codes.abs().float()  # int8 abs is safe: codes are at least -127
    row, col = size.mean(2), size.mean(1)
    mean = row.mean(1, keepdim=True).clamp_min(1e-6)
    rows = (2 * torch.log2((row / mean).clamp_min(2**-6))).round()
    cols = (2 * torch.log2(col.clamp_min(2**-14))).round()
    return rows.to(torch.int16), cols.to(torch.int16)


def descend(
    target: Tensor,
    hessian: Tensor,
    codes: Tensor,
    col: Tensor,
    row: Tensor,
    slope: Tensor,
    sweeps: int,
    *,
    compiled: bool | None = None,
) -> Tensor:
    """Sweeps over all columns, left to right, until `sweeps` are done.

    Args:
        target: float32 [E, rows, cols].
        hessian: float [E, cols, cols], damped as it was for error feedback.
        codes: int8 [E, rows, cols], where to start.
        col: float32 [E, cols], column steps.
        row: float32 [E, rows], row steps; an element's step is their product.
        slope: float32 [E, rows], squared output error that one bit is worth.
        sweeps: number of passes; 0 returns `codes`.
        compiled: use the compiled loop (CPU only); by default wherever the weights are on the CPU.

    Returns:
        int8 [E, rows, cols], |q| <= 127.
    """
    if sweeps == 0:
        return codes
    use_compiled = target.device.type == "cpu" if compiled is None else compiled
    first, more = (t.to(target.device) for t in rate_law())
    h = hessian.float().contiguous()
    q = codes.float()
    g = torch.bmm(target - q * col[:, None, :] * row[:, :, None], h)
    for _ in range(sweeps):
        row_class, col_class = energy_classes(q)
        col_class += CLASS_ZERO
        if use_compiled:
            arrays = (g, h, q, col, row, slope, row_class, col_class, first, more)
            _sweep_kernel(*(t.contiguous().numpy() for t in arrays))
        else:
            _sweep_torch(g, h, q, col, row, slope, row_class, col_class, first, more)
    return q.to(torch.int8)


def _sweep_torch(
    g: Tensor,
    h: Tensor,
    q: Tensor,
    col: Tensor,
    row: Tensor,
    slope: Tensor,
    row_class: Tensor,
    col_class: Tensor,
    first: Tensor,
    more: Tensor,
) -> None:
    """One sweep; g and q [E, rows, cols] are updated in place. This is the definition."""
    for j in range(q.shape[2]):
        context = (row_class + col_class[:, j, None]).long().clamp(0, CLASSES - 1)
        v, step = q[:, :, j], col[:, j, None] * row
        curvature = step * step * h[:, j, j, None]
        pull = 2 * step * g[:, :, j]
        up = _added_bits(v, 1.0, first[context], more[context]) * slope + curvature - pull
        down = _added_bits(v, -1.0, first[context], more[context]) * slope + curvature + pull
        d = torch.where(up < down, 1.0, -1.0)
        d = torch.where((torch.minimum(up, down) < 0) & ((v + d).abs() <= 127), d, 0.0)
        q[:, :, j] += d
        g -= (d * step)[:, :, None] * h[:, j, None, :]


def _added_bits(q: Tensor, d: float, first: Tensor, more: Tensor) -> Tensor:
    """Bits of q + d less those of q."""
    grows = q * d >= 0
    from_zero = torch.where(grows, q == 0, q.abs() == 1)
    bits = torch.where(from_zero, first, more)
    return torch.where(grows, bits, -bits)


@numba.njit(parallel=True, cache=True, error_model="numpy")
def _sweep_kernel(
    g: NDArray[np.float32],
    h: NDArray[np.float32],
    q: NDArray[np.float32],
    col: NDArray[np.float32],
    row: NDArray[np.float32],
    slope: NDArray[np.float32],
    row_class: NDArray[np.int16],
    col_class: NDArray[np.int16],
    first: NDArray[np.float32],
    more: NDArray[np.float32],
) -> None:
    experts, rows, cols = q.shape
    tiles = (rows + TILE - 1) // TILE
    two = np.float32(2)
    for t in numba.prange(experts * tiles):
        e, begin = t // tiles, t % tiles * TILE
        for j in range(cols):
            c, diagonal, column = col[e, j], h[e, j, j], col_class[e, j]
            for r in range(begin, min(begin + TILE, rows)):
                step = c * row[e, r]
                context = min(max(row_class[e, r] + column, 0), CLASSES - 1)
                v, weight = q[e, r, j], slope[e, r]
                curvature = step * step * diagonal
                pull = two * step * g[e, r, j]
                if v == 0:
                    rise = fall = first[context]
                elif v > 0:
                    rise, fall = more[context], -(first[context] if v == 1 else more[context])
                else:
                    rise, fall = -(first[context] if v == -1 else more[context]), more[context]
                up = rise * weight + curvature - pull
                down = fall * weight + curvature + pull
                d = np.float32(1) if up < down else np.float32(-1)
                if min(up, down) < 0 and abs(v + d) <= 127:
                    q[e, r, j] = v + d
                    f = d * step
                    for m in range(cols):
                        g[e, r, m] -= f * h[e, j, m]
