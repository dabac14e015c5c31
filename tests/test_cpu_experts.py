"""Encoded experts on the CPU: what is kept between calls, and torch.compile."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import qmoe
from qmoe.inference import on_cpu
from qmoe.inference.combine import add_rows
from qmoe.inference.experts import Caches, EncodedExperts
from qmoe.models.families.kind import Routed
from qmoe.store.stored_experts import StoredExperts


@pytest.fixture
def written(build_model, write_compressed, tmp_path):
    """A compressed mixtral and its dense twin."""
    dense = write_compressed(build_model("mixtral"), tmp_path / "out")
    return tmp_path / "out", dense


def layers(model):
    return [m for m in model.modules() if isinstance(m, EncodedExperts)]


def share(caches, *models):
    for model in models:
        for module in layers(model):
            module.caches = caches


@pytest.mark.parametrize("decoded", [0, 1 << 30])
def test_models_that_share_caches_keep_their_own_weights(
    written, build_model, write_compressed, model_inputs, tmp_path, decoded
):
    out, dense = written
    other = write_compressed(build_model("mixtral", seed=3), tmp_path / "other")
    models = qmoe.load(out), qmoe.load(tmp_path / "other")
    share(Caches(decoded), *models)
    inputs = model_inputs(dense)
    with torch.no_grad():
        for model, twin in zip(models, (dense, other), strict=True):
            torch.testing.assert_close(
                model(**inputs).logits, twin(**inputs).logits, rtol=1e-3, atol=1e-4
            )


def test_one_checkpoint_loaded_twice_is_parsed_once(written, model_inputs, monkeypatch):
    out, dense = written
    models = qmoe.load(out), qmoe.load(out)
    caches = Caches()
    share(caches, *models)
    calls = counted(monkeypatch)
    with torch.no_grad():
        models[0](**model_inputs(dense))
        first = len(calls)
        models[1](**model_inputs(dense))
    assert len(calls) == first > 0


def counted(monkeypatch):
    calls = []
    parse = StoredExperts.matrix

    def matrix(self, expert, projection, tables):
        calls.append((expert, projection))
        return parse(self, expert, projection, tables)

    monkeypatch.setattr(StoredExperts, "matrix", matrix)
    return calls


def test_payloads_do_not_count_in_the_cache(written, monkeypatch):
    model = qmoe.load(written[0])
    module = layers(model)[0]
    caches = Caches()
    # room for the side data of the module, not for its streams besides
    streams = module.encoded()
    side = sum(
        streams.matrix(e, p, streams.tables(e, p)).side_bytes
        for e in range(module.num_experts)
        for p in range(2)
    )
    tables = {
        t: streams.tables(0, p).bytes_held for p in range(2) for t in [streams.tables_at(0, p)]
    }
    caches.parsed.capacity = side + 2 * sum(tables.values())
    module.caches = caches
    calls = counted(monkeypatch)
    x, index = torch.ones(1, module.layout.projections[0].cols), torch.arange(module.num_experts)
    for _ in range(3):
        module.run_plain(x, index[None], None)
    assert len(calls) == 2 * module.num_experts
    assert caches.parsed.used > 0


def test_a_cache_that_is_too_small_keeps_what_fits(written, monkeypatch):
    model = qmoe.load(written[0])
    module = layers(model)[0]
    caches = Caches()
    module.caches = caches
    x, index = torch.ones(1, module.layout.projections[0].cols), torch.arange(module.num_experts)
    module.run_plain(x, index[None], None)
    caches.parsed.clear()
    caches.parsed.capacity = _half(module)
    calls = counted(monkeypatch)
    for _ in range(2):
        module.run_plain(x, index[None], None)
    every = 2 * module.num_experts
    assert every < len(calls) < 2 * every  # the second time some are there


@pytest.mark.parametrize(
    "family", ["mixtral", "gpt_oss", "jetmoe", "switch_transformers", "llama4_text"]
)
@pytest.mark.parametrize("again", [-1, 1 << 62, None])
def test_a_few_tokens_in_few_calls_change_no_bit(
    family, again, build_model, write_compressed, tmp_path, monkeypatch
):
    """Each expert in a call of its own, all pairs in one, and what is chosen; strangers of both
    signs, a token of them alone, one expert twice."""
    write_compressed(build_model(family), tmp_path / "m")
    module = layers(qmoe.load(tmp_path / "m", dtype=torch.bfloat16))[0]
    if again is not None:
        monkeypatch.setattr(on_cpu, "AGAIN", again)
    g = torch.Generator().manual_seed(0)
    count, cols = module.num_experts, module.layout.projections[0].cols
    for tokens in (0, 1, 7):
        hidden = torch.randn(tokens, cols, generator=g).bfloat16()
        index = torch.randint(-1, count + 1, (tokens, 3), generator=g)
        index[-1:] = torch.tensor([-1, count, 1 << 40])
        index[:1] = torch.tensor([1, 0, 1])
        for weights in (None, torch.rand(tokens, 3, generator=g)):
            found = on_cpu.run_on_cpu(module, hidden, index, weights)
            one = partial(on_cpu._ffn, module, module.encoded())
            want = Routed(hidden, index, weights, (tokens,)).run(count, one)
            assert torch.equal(found, want)
            assert found.dtype == torch.bfloat16


def _half(module):
    streams = module.encoded()
    tables = streams.tables(0, 0)
    return 2 * tables.bytes_held + module.num_experts * streams.matrix(0, 0, tables).side_bytes


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of mappings")
def test_streams_stay_in_their_files_and_are_not_copied(written):
    """Pages of a mapped file are the system's to take back: a model may exceed the memory."""
    model = qmoe.load(written[0])
    for module in layers(model):
        streams = module.encoded()
        for e in range(module.num_experts):
            for p in range(len(module.layout.projections)):
                _, matrix = module.parsed(streams, e, p)
                assert mapped_file(matrix.words.data_ptr()).startswith(str(written[0]))


def mapped_file(address):
    """Name of the file that is mapped at an address, or ""."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, _, _, _, _, *name = line.split(maxsplit=5)
        first, end = (int(n, 16) for n in where.split("-"))
        if first <= address < end:
            return name[0] if name else ""
    return ""


@pytest.mark.parametrize("tokens", [1, 3])
def test_compiled_without_a_break(written, tokens):
    model = qmoe.load(written[0]).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = torch.arange(tokens)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits
        )


def test_gradients_flow_through_the_compiled_module(written):
    module = layers(qmoe.load(written[0]))[0]
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    index, found = torch.tensor([[0, 1], [2, 3], [1, 0]]), []
    for call in (module, compiled):
        x = torch.linspace(-1, 1, 3 * 64).reshape(3, 64).requires_grad_()
        weights = torch.tensor([[0.5, 0.5], [0.1, 0.9], [0.7, 0.3]], requires_grad=True)
        y = call(x, index, weights)
        (y * y).sum().backward()
        found.append((y.detach(), x.grad, weights.grad))
    for plain, traced in zip(*found, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, traced, rtol=1e-4, atol=1e-6)


def test_gradients_of_biases_flow_through_the_compiled_module(
    build_model, write_compressed, tmp_path
):
    write_compressed(build_model("gpt_oss"), tmp_path / "out")
    module = layers(qmoe.load(tmp_path / "out", dtype=torch.float32))[0]
    names = [n for n, p in module.own_parameters() if p.is_floating_point()]
    assert names
    cols = module.layout.projections[0].cols
    x, index = torch.linspace(-1, 1, 2 * cols).reshape(2, cols), torch.tensor([[0, 1], [1, 2]])
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    found = []
    for call in (module, compiled):
        for p in dict(module.own_parameters()).values():
            nn.Parameter.requires_grad_(p, True)
            p.grad = None
        call(x, index, torch.full((2, 2), 0.5)).square().sum().backward()
        found.append([p.grad for _, p in module.own_parameters()])
    for plain, traced in zip(*found, strict=True):
        torch.testing.assert_close(plain, traced, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_added_as_torch_adds_them(dtype):
    g = torch.Generator().manual_seed(3)
    y, weights = (torch.randn(s, generator=g).to(dtype) for s in ((40, 300), (40,)))
    rows = torch.randint(0, 7, (40,), generator=g)
    for share in (weights, None):
        expected = torch.zeros(9, 300)
        for i, row in enumerate(rows):
            expected[row] += (y[i] if share is None else y[i] * share[i]).float()
        out = torch.zeros(9, 300)
        add_rows(out, rows, y, share)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_tokens_together_are_each_token_alone(written, threads):
    """Few and many tokens an expert, an expert that is left out, one that a token has twice."""
    module = layers(qmoe.load(written[0]))[0]
    g = torch.Generator().manual_seed(5)
    for tokens in (2, 7, 40):
        x = torch.randn(tokens, module.layout.projections[0].cols, generator=g)
        index = torch.randint(0, module.num_experts + 1, (tokens, 3), generator=g)
        index[0] = 1
        weights = torch.rand(tokens, 3, generator=g)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        together = module.run_plain(x, index, weights)
        torch.set_num_threads(before)
        alone = [
            module.run_plain(*(t[i : i + 1] for t in (x, index, weights))) for i in range(tokens)
        ]
        assert torch.equal(together, torch.cat(alone))
