"""One slope for all matrices: --dense-bits between whole numbers, --model-bits for a whole file."""

import itertools
import math

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from qmoe.calib.sensitivity import dense_sensitivity
from qmoe.cli import main
from qmoe.compression.allocation import Part, dense_rates, slope, total
from qmoe.compression.pipeline import compress
from qmoe.compression.settings import Settings
from qmoe.errors import QmoeError
from qmoe.models.streamed import StreamedModel
from qmoe.publish.verify import verify
from qmoe.quantize.dense import DenseSolver
from qmoe.source.checkpoint import open_checkpoint
from qmoe.store.inspect import inspect
from qmoe.store.reader import Container

SIZES = {"emb": 4096 * 256, "head": 4096 * 256, "q": 256 * 256, "k": 128 * 256}
SHAPE = {"hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 256}


@pytest.mark.parametrize("bits", [3, 3.5, 4, 4.7, 6, 8])
def test_all_together_take_the_mean(bits):
    rates = dense_rates(SIZES, bits)
    took = sum(SIZES[n] * r for n, r in rates.items()) / sum(SIZES.values())
    assert took == pytest.approx(bits, abs=0.002)
    assert all(2 <= r <= 8 for r in rates.values())


def test_no_exchange_of_bits_lowers_the_loss():
    """The allocation is the minimum: moving bits between any two matrices makes it worse."""
    sizes = {"a": 1000, "b": 5000, "c": 20000}
    felt = {"a": 9.0, "b": 1.0, "c": 0.2}  # per weight
    rates = dense_rates(sizes, 4.0, {n: math.log2(v) / 2 for n, v in felt.items()})

    def loss(r):
        return sum(sizes[n] * felt[n] * 4.0 ** -r[n] for n in r)

    assert len(set(rates.values())) == 3
    best = loss(rates)
    for a, b in itertools.permutations(sizes, 2):
        moved = dict(rates)
        moved[a] += 0.1
        moved[b] -= 0.1 * sizes[a] / sizes[b]
        assert loss(moved) > best * (1 + 1e-4)


def test_without_scores_all_are_alike():
    assert set(dense_rates(SIZES, 4.5).values()) == {4.5}


def test_slope_is_where_the_budget_is():
    parts = [Part(1 << 20), Part(1 << 14, 3.0), Part(1 << 24, -2.0, 0.25, 5.0)]
    budget = 2.5 * sum(p.weights for p in parts)
    assert total(parts, slope(parts, budget)) == pytest.approx(budget, rel=1e-9)
    assert math.isfinite(slope(parts, 0.0))
    assert math.isfinite(slope(parts, 1e18))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dense_bits": 2.5}, "--dense-bits 2.5: choose between 3 and 8"),
        ({"dense_bits": 9}, "--dense-bits 9: choose between 3 and 8"),
        ({"model_bits": 2, "bits": 0.8}, "without --bits"),
        ({"model_bits": 2, "dense_bits": 4}, "without --bits"),
        ({"model_bits": 2, "method": "gptq2"}, "--model-bits belongs to --method rd"),
        ({"model_bits": -1.0}, "give a positive number"),
        ({"dense_bits": float("nan")}, "dense_bits is nan; give a number that is finite"),
    ],
)
def test_what_cannot_be_is_one_sentence(options, sentence):
    with pytest.raises(QmoeError, match=sentence):
        Settings(**{"method": "rd", **options}).solver()


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("allocation")
    where = tiny.save("mixtral", folder / "source", vocab_size=512, **SHAPE)
    tiny.save_tokenizer(where)
    return where, tiny.save_text(folder / "text.txt", 1500)


def test_a_rate_between_whole_numbers(source, tmp_path):
    where, text = source
    given = {"delta": 4.0, "dense_bits": 4.6, "solver_options": {"gradient": 1}}
    settings = Settings("rd", str(text), calib_tokens=1024, ctx=128, **given)
    compress(str(where), tmp_path / "out", settings)
    verify(tmp_path / "out")
    found = inspect(tmp_path / "out")
    assert found.coded_dense_bits_per_weight == pytest.approx(4.6, rel=0.02)
    assert found.settings["dense_bits"] == 4.6
    entries = Container.open(tmp_path / "out").manifest["report"]["dense"]
    own = {n: 8 * e["bytes"] / e["weights"] for n, e in entries.items()}
    assert max(own.values()) - min(own.values()) > 0.3  # gradients tell them apart
    took = sum(own[n] * e["weights"] for n, e in entries.items())
    assert took / sum(e["weights"] for e in entries.values()) == pytest.approx(4.6, rel=0.02)


@torch.no_grad()
def test_sensitivity_is_what_coding_does_to_the_loss(tiny, tmp_path):
    """The KL that coding one matrix alone at 4 bits causes, beside what the scores say of it."""
    where = tiny.save("mixtral", tmp_path / "source", **SHAPE)
    streamed = StreamedModel(open_checkpoint(str(where)))
    streamed.load_rest()
    ids = torch.randint(0, 50, (8, 64), generator=torch.Generator().manual_seed(0))
    names = [f"model.layers.1.self_attn.{p}_proj" for p in "qkvo"] + ["lm_head"]
    modules = {f"{n}.weight": streamed.model.get_submodule(n) for n in names}
    scores = dense_sensitivity(streamed, [{"input_ids": ids}], modules)

    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()
    inputs = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, a, n=name: inputs.__setitem__(n, a[0].flatten(0, -2).double())
        )
    before = model(input_ids=ids).logits.log_softmax(-1)
    hessians = {n: x.T @ x for n, x in inputs.items()}
    found = {}
    for name in names:
        weight = model.get_submodule(name).weight
        kept = weight.clone()
        solver = DenseSolver(kept, hessians[name], 4)
        (coded,) = solver.solve(slice(None), solver.first_step())
        weight.copy_(coded.dequantize())
        after = model(input_ids=ids).logits.log_softmax(-1)
        loss = float((before.exp() * (before - after)).sum(-1).mean())
        weight.copy_(kept)
        found[f"{name}.weight"] = math.log2(loss / weight.numel()) / 2
    apart = {n: found[n] - scores[n] for n in modules}
    assert max(apart.values()) - min(apart.values()) < 1.2, (found, scores)
    assert max(scores.values()) - min(scores.values()) > 1  # there is something to tell apart


def test_one_target_for_the_whole_file(source, tmp_path):
    where, text = source
    line = ["compress", str(where), str(tmp_path / "out"), "--model-bits", "3", "--json"]
    line += ["--calib", str(text), "--calib-tokens", "1024", "--ctx", "128"]
    done = CliRunner().invoke(main, line)
    assert done.exit_code == 0, done.output
    found = inspect(tmp_path / "out")
    assert found.model_bits_per_weight == pytest.approx(3, rel=0.02)
    assert found.settings["model_bits"] == 3
    assert found.settings["bits"] < 3 < found.settings["dense_bits"]
    assert "--model-bits 3: experts" in done.output
    verify(tmp_path / "out")


def test_a_target_out_of_reach_says_what_is_within(source, tmp_path):
    where, text = source
    settings = Settings("rd", str(text), calib_tokens=1024, ctx=128, model_bits=0.1)
    with pytest.raises(QmoeError, match=r"--model-bits 0.1: this model can take \d\.\d\d to"):
        compress(str(where), tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
