"""Compiled loops against their torch definitions, and the linear algebra below them."""

import pytest
import torch

from qmoe.quantize.feedback import BLOCK, Grid, feed_back, round_to_grid
from qmoe.quantize.linalg import damped, inverse_factor, shrunk


def setup(experts: int, rows: int, cols: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(experts, rows, cols, generator=g)
    x = torch.randn(experts, 3 * cols + 8, cols, generator=g)
    x = x @ (torch.eye(cols) + torch.randn(cols, cols, generator=g) / cols**0.5)
    h = damped(x.mT @ x, 0.05)
    factor, notes = inverse_factor(h)
    assert notes == [""] * experts
    return w, h, factor


@pytest.mark.parametrize(
    ("experts", "rows", "cols"),
    [(1, 1, 1), (1, 2, 2), (2, 63, 64), (3, 65, 65), (2, 200, 130), (1, 5, 300)],
)
def test_feedback_compiled_equals_definition(experts, rows, cols):
    w, _, factor = setup(experts, rows, cols)
    g = torch.Generator().manual_seed(1)
    col = 20 * factor.diagonal(dim1=-2, dim2=-1).float()
    row, row_neg = torch.rand(2, experts, rows, generator=g) + 0.5
    low = -torch.randint(0, 4, (experts, rows), generator=g).float()
    high = torch.randint(0, 4, (experts, rows), generator=g).float()
    for grid in (Grid.symmetric(col, row), Grid(col, row, row_neg, low, high)):
        fast = feed_back(w, factor, grid, compiled=True)
        assert torch.equal(fast, feed_back(w, factor, grid, compiled=False))
        assert (fast >= grid.low[:, :, None]).all()
        assert (fast <= grid.high[:, :, None]).all()


def test_feedback_is_gptq():
    """Against the unblocked textbook loop in float64: same integers but for a rare tie."""
    w, _, factor = setup(1, 40, 2 * BLOCK + 7)
    col = 20 * factor.diagonal(dim1=-2, dim2=-1).float()
    fast = feed_back(w, factor, Grid.symmetric(col, torch.ones(1, 40)))[0]
    v, u = w[0].double(), factor[0]
    q = torch.zeros_like(v)
    for j in range(v.shape[1]):
        q[:, j] = (v[:, j] / col[0, j]).round()
        v[:, j:] -= ((v[:, j] - q[:, j] * col[0, j]) / u[j, j])[:, None] * u[j, j:]
    assert (fast == q).double().mean() > 0.999


def test_identity_hessian_means_rounding():
    w = torch.randn(2, 33, 70, generator=torch.Generator().manual_seed(0))
    grid = Grid.symmetric(torch.full((2, 70), 0.3), torch.ones(2, 33), limit=3)
    factor = torch.eye(70).expand(2, 70, 70)
    assert torch.equal(feed_back(w, factor, grid), round_to_grid(w, grid))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_feedback_on_cuda():
    w, _, factor = setup(2, 200, 130)
    col, row = 20 * factor.diagonal(dim1=-2, dim2=-1).float(), torch.ones(2, 200)
    codes = feed_back(w, factor, Grid.symmetric(col, row))
    grid = Grid.symmetric(col.cuda(), row.cuda())
    device = feed_back(w.cuda(), factor.cuda(), grid)
    # the matrix products between blocks round differently
    assert (codes == device.cpu()).float().mean() > 0.995


def test_inverse_factor():
    _, h, factor = setup(3, 1, 90)
    eye = torch.eye(90, dtype=torch.float64).expand(3, 90, 90)
    assert torch.allclose(factor.mT @ factor @ h, eye, atol=1e-9)
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal(dim1=-2, dim2=-1) > 0).all()


def test_inverse_factor_escalates_by_name():
    _, h, _ = setup(4, 1, 20)
    h[1] = 1.0  # rank one
    h[2] = -torch.eye(20, dtype=torch.float64)  # no amount of noise makes this a Hessian
    h[3] = 0.0
    with pytest.raises(ValueError, match="expert 2"):
        inverse_factor(h)
    h[2] = damped(h[3:], 0.1)[0]
    factor, notes = inverse_factor(h)
    assert notes[0] == notes[2] == ""
    assert "singular" in notes[1]
    assert "singular" in notes[3]
    assert factor.isfinite().all()


def test_shrunk_keeps_the_expert_s_size():
    _, h, _ = setup(2, 1, 20)
    layer = 1000 * h.sum(0)
    mixed = shrunk(h, layer, 0.5)

    def trace(t):
        return t.diagonal(dim1=-2, dim2=-1).sum(-1)

    assert torch.allclose(trace(mixed), trace(h))
    assert torch.equal(shrunk(h, layer, 0.0), h)
    assert torch.equal(shrunk(h, None, 0.5), h)
    assert shrunk(torch.zeros_like(h), layer, 0.5).abs().max() == 0
