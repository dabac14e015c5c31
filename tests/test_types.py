"""The scale grid: exact, invertible, and exact in bfloat16 where exports need it."""

import pytest
import torch

from qmoe.types import SCALE_MAX, SCALE_MIN, QuantizedMatrix, grid_index, grid_scale

ALL = torch.arange(SCALE_MIN, SCALE_MAX + 1)


@pytest.mark.parametrize("step", [1, 4, 16, 48, 64, 128])
def test_index_inverts_scale(step):
    k = ALL[ALL % step == 0]
    assert torch.equal(grid_index(grid_scale(k), step), k.to(torch.int16))


def test_nearest_index_is_taken():
    x = torch.logspace(-6, 6, 999, dtype=torch.float64)
    k = grid_index(x).long()
    error = (grid_scale(k).double() - x).abs()
    for other in (k - 1, k + 1):
        assert (error <= (grid_scale(other).double() - x).abs() + 1e-12 * x).all()


def test_zero_and_huge_scales_stay_in_range():
    for step in (1, 16, 48):
        low, high = grid_index(torch.tensor([0.0, 1e30]), step).tolist()
        assert SCALE_MIN <= low < SCALE_MIN + step
        assert SCALE_MAX - step < high <= SCALE_MAX


def test_scales_and_small_multiples_are_exact_in_bfloat16():
    assert torch.equal(grid_scale(ALL).bfloat16().float(), grid_scale(ALL))
    q = torch.arange(-36, 37).to(torch.int8)
    quarter = torch.arange(-640, 640, 16).to(torch.int16)
    m = QuantizedMatrix(
        q[:, None].expand(-1, len(quarter)).contiguous(), torch.zeros(len(q)).short(), quarter
    )
    w = m.dequantize()
    assert torch.equal(w.bfloat16().float(), w)
