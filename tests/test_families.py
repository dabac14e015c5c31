"""Every kind of experts module: found, read, written, run expert by expert like the module
itself."""

from functools import partial

import pytest
import torch

from qmoe.errors import UnsupportedModelError
from qmoe.models.families import find as layouts


def _by_experts(module, *args, **kwargs):
    """The module's forward made of `route` and `expert_forward`, weights passed in as copies."""
    kind = layouts.kind_of(module)

    def one(expert, x):
        weights = {k: w.clone() for k, w in layouts.read_expert(module, expert).items()}
        return layouts.expert_forward(module, weights, expert, x)

    return layouts.route(module, *args, **kwargs).run(kind.experts(module), one)


@torch.no_grad()
def test_expert_by_expert_equals_the_module(family, build_model, model_inputs):
    model = build_model(family)
    layouts.repair(model)
    inputs = model_inputs(model)
    expected = model(**inputs, use_cache=False).logits
    found = layouts.find_experts(model)
    for _, module in found:
        module.forward = partial(_by_experts, module)
    got = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_layout_matches_the_matrices(family, build_model):
    model = build_model(family)
    for layout, module in layouts.find_experts(model):
        assert layout.experts in (4, 8)
        for expert in range(layout.experts):
            matrices = layouts.read_expert(module, expert)
            assert list(matrices) == [p.name for p in layout.projections]
            for p in layout.projections:
                assert matrices[p.name].shape == (p.rows, p.cols)
        encoded = layouts.KINDS[layout.kind].encoded(module)
        assert sum(module.get_parameter(n).numel() for n in encoded) == layout.weights


def test_write_is_the_inverse_of_read(family, build_model):
    a, b = build_model(family, seed=0), build_model(family, seed=1)
    for (layout, x), (_, y) in zip(layouts.find_experts(a), layouts.find_experts(b), strict=True):
        for expert in range(layout.experts):
            layouts.KINDS[layout.kind].write(y, expert, layouts.read_expert(x, expert))
        for name in layouts.KINDS[layout.kind].encoded(x):
            assert torch.equal(x.get_parameter(name), y.get_parameter(name))


@torch.no_grad()
def test_record_sees_the_input_of_down(build_model):
    model = build_model("gpt_oss")
    _, module = layouts.find_experts(model)[0]
    x, seen = torch.randn(3, 64), []
    y = layouts.expert_forward(module, layouts.read_expert(module, 1), 1, x, seen.append)
    assert seen[0].shape == (3, 32)
    expected = seen[0] @ module.down_proj[1] + module.down_proj_bias[1]
    torch.testing.assert_close(y, expected)


@torch.no_grad()
def test_nllb_follows_the_equation(build_model):
    """y_i = sum over e of p[i, e] ffn_e(x_i), token by token, experts called as modules."""
    model = build_model("nllb-moe")
    sparse = model.model.encoder.layers[1].ffn
    x = torch.randn(1, 40, 64)
    _, probs, _ = sparse.router(x[0])
    expected = torch.zeros(40, 64)
    for i in range(40):
        for e in range(4):
            expected[i] += probs[i, e] * sparse.experts[f"expert_{e}"](x[0, i])
    expected *= 1 - sparse.experts.moe_token_dropout  # inference scale of the token dropout
    broken = sparse(x)[0]
    assert layouts.repair(model) == [
        "model.encoder.layers.1.ffn.experts",
        "model.decoder.layers.1.ffn.experts",
    ]
    torch.testing.assert_close(sparse(x)[0], expected, rtol=1e-5, atol=1e-6)
    # If this fails, transformers has repaired its forward and `repair` can go.
    assert (broken - expected).abs().max() > 0.1 * expected.abs().max()


@torch.no_grad()
def test_switch_tokens_over_capacity_get_zero(build_model):
    model = build_model("switch_transformers", expert_capacity=1)
    _, module = layouts.find_experts(model)[0]
    hidden = torch.randn(6, 64)
    mask = torch.zeros(6, 1, 4, dtype=torch.int64)
    mask[0, 0, 2] = 1
    out = layouts.route(module, hidden, mask, torch.full((6, 1), 0.5)).run(
        4, lambda e, x: layouts.expert_forward(module, layouts.read_expert(module, e), e, x)
    )
    assert torch.equal(out[1:], torch.zeros(5, 64))
    assert out[0].abs().max() > 0


@torch.no_grad()
def test_no_token_at_all(build_model):
    _, module = layouts.find_experts(build_model("mixtral"))[0]
    out = _by_experts(
        module, torch.zeros(0, 64), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)
    )
    assert out.shape == (0, 64)
    sentinel = torch.full((3, 2), 4)  # expert-parallel runs mark experts of other ranks like this
    assert torch.equal(
        _by_experts(module, torch.randn(3, 64), sentinel, torch.ones(3, 2)), torch.zeros(3, 64)
    )


def test_a_dense_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="no mixture-of-experts module"):
        layouts.find_experts(torch.nn.Linear(3, 3))
