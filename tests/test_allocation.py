"""One slope for all parts: --model-bits for a whole file; --dense-bits between whole numbers."""

import itertools
import math
from dataclasses import replace

import pytest
from click.testing import CliRunner

from qmoe.cli import main
from qmoe.compression.allocation import Part, slope, total
from qmoe.compression.pipeline import compress
from qmoe.compression.settings import Settings
from qmoe.errors import QmoeError
from qmoe.inference.load import load
from qmoe.publish.verify import verify
from qmoe.store.inspect import inspect
from qmoe.store.manifest import MANIFEST, read_manifest, write_sealed
from qmoe.store.reader import Container

SHAPE = {"hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 256}


def test_no_exchange_of_bits_lowers_the_loss():
    """The slope is the minimum: moving bits between any two parts makes it worse."""
    sizes, felt = [1000, 5000, 20000], [9.0, 1.0, 0.2]  # what the loss feels, per weight
    parts = [Part(n, math.log2(s) / 2) for n, s in zip(sizes, felt, strict=True)]
    t = slope(parts, 4.0 * sum(sizes))
    rates = [p.at(t) for p in parts]

    def loss(rates):
        return sum(n * s * 4.0**-r for n, s, r in zip(sizes, felt, rates, strict=True))

    assert sum(n * r for n, r in zip(sizes, rates, strict=True)) == pytest.approx(4 * sum(sizes))
    for a, b in itertools.permutations(range(3), 2):
        moved = list(rates)
        moved[a] += 0.1
        moved[b] -= 0.1 * sizes[a] / sizes[b]
        assert loss(moved) > loss(rates) * (1 + 1e-4)


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
    settings = Settings("rd", str(text), calib_tokens=1024, ctx=128, delta=4.0, dense_bits=4.6)
    compress(str(where), tmp_path / "out", settings)
    verify(tmp_path / "out")
    found = inspect(tmp_path / "out")
    assert found.coded_dense_bits_per_weight == pytest.approx(4.6, rel=0.02)
    assert found.settings["dense_bits"] == 4.6
    entries = Container.open(tmp_path / "out").manifest["report"]["dense"]
    own = {n: 8 * e["bytes"] / e["weights"] for n, e in entries.items()}
    assert own == pytest.approx(dict.fromkeys(own, 4.6), rel=0.05)  # all alike


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


def test_a_checkpoint_of_the_options_that_are_gone(source, tmp_path):
    """Older versions wrote `gradient` among the solver's options: it is shown, and nobody minds."""
    where, text = source
    settings = Settings("rd", str(text), calib_tokens=1024, ctx=128, delta=4.0)
    compress(str(where), tmp_path / "out", settings)
    manifest = dict(read_manifest(tmp_path / "out"))
    manifest.pop("checksum", None)
    manifest["settings"] |= {"knobs": {"gradient": 1}, "layer_weights": "gradient"}
    write_sealed(tmp_path / "out" / MANIFEST, manifest)
    verify(tmp_path / "out")
    assert inspect(tmp_path / "out").settings["knobs"] == {"gradient": 1}
    load(tmp_path / "out")
    again = replace(settings, solver_options={"gradient": 1})
    with pytest.raises(QmoeError, match=r"rd does not take .*gradient"):
        compress(str(where), tmp_path / "again", again)
