"""Solvers on small problems with a hot, a starved, a one-token and an empty expert."""

import math

import pytest
import torch
from torch import Tensor

from qmoe.errors import NonFiniteError
from qmoe.quantize import METHODS, Problem, Solution, get_method
from qmoe.quantize.linalg import damped, inverse_factor, times_upper, times_upper_t
from qmoe.types import SCALE_MIN, grid_scale

TOKENS = (600, 300, 0, 1, 5)  # hot, usual, empty, one token, starved
EMPTY, ONE, STARVED = 2, 3, 4
CALIBRATED = ["qmoe", "gptq", "rd"]


def make_problem(
    rows: int = 48, cols: int = 70, seed: int = 0, tokens: tuple[int, ...] = TOKENS
) -> Problem:
    g = torch.Generator().manual_seed(seed)
    experts = len(tokens)
    weight = torch.randn(experts, rows, cols, generator=g) * torch.rand(cols, generator=g)
    mix = torch.randn(cols, cols, generator=g) / cols**0.5 + torch.eye(cols)
    hessians, crosses = [], []
    for n in tokens:
        x = torch.randn(n, cols, generator=g) @ mix
        original = x + 0.1 * torch.randn(n, cols, generator=g)
        hessians.append(x.T @ x)
        crosses.append(original.T @ x)
    h = torch.stack(hessians)
    return Problem(weight, h, torch.tensor(tokens), h.sum(0), sum(tokens), torch.stack(crosses))


def method(name: str, **params):
    return get_method(name, **({"delta": 6.0} if name == "rd" else {}), **params)


def dequantized(solution: Solution) -> Tensor:
    return torch.stack([m.dequantize() for m in solution.matrices])


def relative_error(problem: Problem, solution: Solution) -> Tensor:
    """Squared output error over squared output, per expert, on the expert's own Hessian."""
    w, d = problem.weight, problem.weight - dequantized(solution)
    return ((d @ problem.hessian) * d).sum((1, 2)) / ((w @ problem.hessian) * w).sum((1, 2))


def same(a: Solution, b: Solution) -> bool:
    return all(
        torch.equal(x.codes, y.codes)
        and torch.equal(x.row_scale, y.row_scale)
        and torch.equal(x.col_scale, y.col_scale)
        for x, y in zip(a.matrices, b.matrices, strict=True)
    )


def only(problem: Problem, e: int) -> Problem:
    """One expert of a problem; it keeps its layer."""
    one = slice(e, e + 1)
    return Problem(
        problem.weight[one],
        problem.hessian[one],
        problem.tokens[one],
        problem.layer_hessian,
        problem.layer_tokens,
        None if problem.cross is None else problem.cross[one],
    )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 2), (48, 70), (17, 129)])
def test_shapes_and_grid(name, rows, cols):
    solution = method(name).solve(make_problem(rows, cols))
    assert len(solution.matrices) == len(solution.notes) == len(TOKENS)
    for m in solution.matrices:
        assert m.codes.shape == (rows, cols)
        w = m.dequantize()
        assert w.isfinite().all()
        # the values are the grid's, by construction and exactly
        row = grid_scale(m.row_scale)[:, None]
        if m.row_scale_neg is not None:
            row = torch.where(m.codes < 0, grid_scale(m.row_scale_neg)[:, None], row)
        assert torch.equal(w, m.codes.float() * grid_scale(m.col_scale) * row)


@pytest.mark.parametrize("name", ["rtn", "qmoe"])
def test_ternary_levels_are_row_extremes(name):
    problem = make_problem()
    for w, m in zip(problem.weight, method(name).solve(problem).matrices, strict=True):
        assert set(m.codes.unique().tolist()) <= {-1, 0, 1}
        assert (m.col_scale == 0).all()
        half_step = 1 + 0.51 / 64  # linear inside an octave
        for level, extreme in (
            (grid_scale(m.row_scale), w.amax(1)),
            (grid_scale(m.row_scale_neg), -w.amin(1)),
        ):
            assert (level / extreme).log().abs().max() <= math.log(half_step)


@pytest.mark.parametrize("name", ["rtn", "qmoe"])
def test_rows_of_one_sign_and_zero_rows(name):
    problem = make_problem(4, 20)
    w = problem.weight.clone()
    w[:, 0] = w[:, 0].abs()
    w[:, 1] = -w[:, 1].abs()
    w[:, 2] = 0
    solution = method(name).solve(Problem(w, problem.hessian, problem.tokens))
    for m in solution.matrices:
        assert (m.codes[0] >= 0).all()
        assert (m.codes[1] <= 0).all()
        assert (m.codes[2] == 0).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_levels(bits):
    for m in get_method("gptq", bits=bits).solve(make_problem()).matrices:
        spread = m.codes.amax(1).int() - m.codes.amin(1).int()
        assert spread.max() <= 2**bits - 1
        assert (m.codes.amin(1) <= 0).all()
        assert (m.codes.amax(1) >= 0).all()


@pytest.mark.parametrize("name", ["qmoe", "gptq"])
def test_feedback_beats_rounding(name):
    """The same grid without feedback: what an empty expert gets."""
    problem = make_problem(256, 128)
    rounded = method(name).solve(
        Problem(problem.weight, torch.zeros_like(problem.hessian), problem.tokens * 0)
    )
    better = relative_error(problem, method(name).solve(problem))
    plain = relative_error(problem, rounded)
    for e in (0, 1):
        assert better[e] < 0.9 * plain[e]


def test_rd_beats_ternary_at_fewer_symbols():
    problem = make_problem(256, 128)
    ternary = method("qmoe").solve(problem)
    knobs = {"drift": 0.0, "shrinkage": 0.0, "fit_rows": True}
    rd = get_method("rd", delta=60.0, **knobs).solve(problem)
    mean = [s.matrices[0].codes.float().abs().mean() for s in (ternary, rd)]
    assert mean[1] < 0.9 * mean[0]
    assert relative_error(problem, rd)[0] < 0.95 * relative_error(problem, ternary)[0]


def test_rd_error_falls_with_delta():
    problem = make_problem()
    errors = [
        relative_error(problem, get_method("rd", delta=d, drift=0.0).solve(problem))[0].item()
        for d in (16.0, 8.0, 4.0, 2.0, 1.0, 0.5)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3


def test_rd_high_rate_stays_in_int8():
    """A huge column at a tiny delta: steps grow so that nothing saturates."""
    problem = make_problem()
    w = problem.weight.clone()
    w[:, :, 5] *= 1000
    p = Problem(w, problem.hessian, problem.tokens, problem.layer_hessian, problem.layer_tokens)
    solution = get_method("rd", delta=0.01, drift=0.0).solve(p)
    assert relative_error(p, solution)[0] < 1e-3
    assert max(m.codes.abs().max().item() for m in solution.matrices) <= 127


def test_rd_scales_are_coarse():
    solution = get_method("rd", delta=6.0, col_step=16, row_step=4).solve(make_problem())
    for m in solution.matrices:
        assert (m.col_scale % 16 == 0).all()
        assert (m.row_scale % 4 == 0).all()
        assert m.row_scale_neg is None


def test_rd_row_fit_lowers_the_error():
    problem = make_problem(256, 128)
    knobs = {"delta": 20.0, "drift": 0.0, "row_step": 1}
    fitted = relative_error(problem, get_method("rd", fit_rows=True, **knobs).solve(problem))
    unfitted = relative_error(problem, get_method("rd", **knobs).solve(problem))
    assert (fitted[:2] < unfitted[:2]).all()


def test_rd_drift_moves_towards_the_original_output():
    """Against the original model's outputs, X_orig W^T, from inputs X: drift lowers the error."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(4000, 40, generator=g)
    original = x @ (torch.eye(40) + 0.2 * torch.randn(40, 40, generator=g))
    w = torch.randn(1, 64, 40, generator=g)
    problem = Problem(w, (x.T @ x)[None], torch.tensor([4000]), None, 0, (original.T @ x)[None])

    def error(drift: float) -> float:
        solved = get_method("rd", delta=20.0, drift=drift, damping=0.01).solve(problem)
        return (original @ w[0].T - x @ dequantized(solved)[0].T).square().mean().item()

    none, half, full = error(0.0), error(0.5), error(1.0)
    assert full < half < none
    assert full < 0.2 * none


def test_rd_importance_is_a_finer_delta():
    problem = make_problem()
    heavy = Problem(
        problem.weight,
        problem.hessian,
        problem.tokens,
        problem.layer_hessian,
        problem.layer_tokens,
        importance=4.0,
    )
    assert same(
        get_method("rd", delta=8.0, drift=0.0).solve(heavy),
        get_method("rd", delta=4.0, drift=0.0).solve(problem),
    )


@pytest.mark.parametrize("name", ["qmoe", "gptq"])
def test_experts_without_tokens_are_rounded_and_named(name):
    problem = make_problem()
    solution = method(name).solve(problem)
    assert "no tokens" in solution.notes[EMPTY]
    assert solution.notes[0] == solution.notes[1] == ""
    if name == "qmoe":
        assert torch.equal(
            solution.matrices[EMPTY].codes, method("rtn").solve(problem).matrices[EMPTY].codes
        )


def test_rd_without_tokens_uses_the_layer():
    problem = make_problem()
    solution = method("rd").solve(problem)
    assert solution.notes == ["", "", "no tokens: layer's Hessian used", "", ""]
    layer = Problem(
        problem.weight[EMPTY : EMPTY + 1],
        problem.layer_hessian[None] / problem.layer_tokens,
        torch.tensor([1]),
        problem.layer_hessian,
        problem.layer_tokens,
    )
    assert torch.equal(
        solution.matrices[EMPTY].codes,
        get_method("rd", delta=6.0, drift=0.0).solve(layer).matrices[0].codes,
    )


def test_rd_without_any_token_in_the_layer():
    problem = make_problem(tokens=(0, 0))
    solution = method("rd").solve(problem)
    assert all("no tokens" in n for n in solution.notes)
    assert dequantized(solution).isfinite().all()


@pytest.mark.parametrize("name", ["qmoe", "rd"])
def test_singular_hessian_is_named(name):
    problem = make_problem()
    h = problem.hessian.clone()
    h[1] = torch.ones_like(h[1])  # rank one
    knobs = {"damping": 0.0}
    solution = method(name, **knobs, **({"drift": 0.0} if name == "rd" else {})).solve(
        Problem(problem.weight, h, problem.tokens)
    )
    assert "singular Hessian" in solution.notes[1]
    assert solution.notes[0] == ""
    assert dequantized(solution).isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["weight", "hessian", "cross"])
def test_non_finite_input_is_named(field, bad):
    problem = make_problem()
    tensors = {"weight": problem.weight, "hessian": problem.hessian, "cross": problem.cross}
    tensors[field] = tensors[field].clone()
    tensors[field][3, 1, 2] = bad
    with pytest.raises(NonFiniteError, match="expert 3"):
        Problem(tokens=problem.tokens, **tensors)


def test_large_finite_values_are_not_called_non_finite():
    problem = make_problem()
    Problem(torch.full_like(problem.weight, 3e38), problem.hessian, problem.tokens)


def test_wrong_shapes_raise():
    problem = make_problem()
    with pytest.raises(ValueError, match="hessian"):
        Problem(problem.weight, problem.hessian[:2], problem.tokens)
    with pytest.raises(ValueError, match="float32"):
        Problem(problem.weight.double(), problem.hessian, problem.tokens)
    with pytest.raises(ValueError, match="cross"):
        get_method("rd", delta=1.0, drift=0.5).solve(
            Problem(problem.weight, problem.hessian, problem.tokens)
        )


@pytest.mark.parametrize("name", METHODS)
def test_batched_equals_single(name):
    problem = make_problem()
    whole = method(name).solve(problem)
    for e in range(len(TOKENS)):
        one = method(name).solve(only(problem, e))
        assert same(one, Solution([whole.matrices[e]], [whole.notes[e]]))
        assert one.notes == [whole.notes[e]]


@pytest.mark.parametrize("name", METHODS)
def test_same_result_twice_and_with_more_threads(name):
    problem = make_problem(300, 200)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first, second = method(name).solve(problem), method(name).solve(problem)
        torch.set_num_threads(2)
        third = method(name).solve(problem)
    finally:
        torch.set_num_threads(threads)
    assert same(first, second)
    assert same(first, third)


@pytest.mark.parametrize("name", METHODS)
def test_input_is_left_alone(name):
    problem = make_problem()
    copies = [problem.weight.clone(), problem.hessian.clone(), problem.cross.clone()]
    method(name).solve(problem)
    for before, after in zip(copies, (problem.weight, problem.hessian, problem.cross), strict=True):
        assert torch.equal(before, after)


def test_extreme_scales():
    """Weights near the ends of the scale grid neither overflow nor vanish."""
    problem = make_problem()
    for factor in (2.0**-28, 2.0**24):
        scaled = Problem(problem.weight * factor, problem.hessian, problem.tokens)
        for name in ("rtn", "qmoe"):
            solution = method(name).solve(scaled)
            assert relative_error(scaled, solution)[0] < 1
            assert all((m.row_scale > SCALE_MIN).all() for m in solution.matrices)


def test_methods_are_validated():
    with pytest.raises(ValueError, match="unknown method 'awq'"):
        get_method("awq")
    with pytest.raises(ValueError, match="bits"):
        get_method("gptq", bits=9)
    for bad in ({"delta": 0.0}, {"delta": 1.0, "drift": 1.5}, {"delta": 1.0, "damping": -1.0}):
        with pytest.raises(ValueError, match="out of range"):
            get_method("rd", **bad)
    assert get_method("rd", delta=2.0, drift=0.25).drift == 0.25
    assert not get_method("qmoe").weighted


@pytest.mark.parametrize("cols", [1, 129, 1300])
def test_factor_and_triangular_products(cols):
    g = torch.Generator().manual_seed(cols)
    x = torch.randn(2, 2 * cols + 1, cols, generator=g, dtype=torch.float64)
    h = damped(x.mT @ x, 0.01)
    kept = h.clone()
    u, notes = inverse_factor(h)
    assert torch.equal(h, kept)
    assert notes == ["", ""]
    assert not u.tril(-1).any()
    assert torch.allclose(u @ h @ u.mT, torch.eye(cols, dtype=h.dtype).expand_as(h), atol=1e-10)
    a = torch.randn(2, 3, cols, generator=g, dtype=torch.float64)
    assert torch.allclose(times_upper(a, u), a @ u, atol=1e-12)
    assert torch.allclose(times_upper_t(a, u), a @ u.mT, atol=1e-12)


def test_one_singular_hessian_does_not_disturb_the_others():
    h = torch.eye(300, dtype=torch.float64).repeat(3, 1, 1)
    h[1, :, 7] = h[1, 7, :] = 5.0  # indefinite
    u, notes = inverse_factor(h)
    assert [bool(n) for n in notes] == [False, True, False]
    assert torch.isfinite(u).all()
    assert torch.equal(u[0], h[0])
