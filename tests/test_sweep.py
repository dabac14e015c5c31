"""Sweeps resume, draw and say what is wrong; options of rd reach the solver and the manifest."""

import json
import sys

import pytest
import torch
from click.testing import CliRunner

from qmoe import codec
from qmoe.cli import main
from qmoe.compression.pipeline import compress
from qmoe.compression.settings import Settings
from qmoe.errors import CorruptError, QmoeError
from qmoe.measure import points
from qmoe.measure.dictionary import dictionary_bits
from qmoe.measure.points import Points, nominal_bits, point_name
from qmoe.measure.sweep import NO_MATPLOTLIB, parse_bits, parse_methods
from qmoe.quantize import get_method, rd
from qmoe.quantize.types import Problem
from qmoe.store.reader import Container

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    """A tiny random Mixtral with its tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("sweep")
    source = tiny.save("mixtral", folder / "source", num_hidden_layers=2)
    tiny.save_tokenizer(source)
    return source, tiny.save_text(folder / "text.txt", 3000)


def _sweep(model, out, *more, bits="2"):
    source, text = str(model[0]), str(model[1])
    command = ["sweep", source, str(out), "--bits", bits, "--calib", text, "--text", text]
    options = ["--calib-tokens", "2048", "--tokens", "512", "--ctx", "64", "--device", "cpu"]
    return CliRunner().invoke(main, [*command, *options, *more], catch_exceptions=False)


@pytest.fixture(scope="module")
def swept(model, tmp_path_factory):
    """Folder and JSON of a finished sweep of two points."""
    out = tmp_path_factory.mktemp("swept") / "out"
    result = _sweep(model, out, "--methods", "gptq2", "--json")
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout.splitlines()[-1])


def test_a_sweep_measures_writes_and_cleans_up(swept):
    out, found = swept
    rd_point, gptq = found["points"]
    assert [rd_point["point"], gptq["point"]] == ["rd-2", "gptq2"]
    assert rd_point["bits_per_weight"] == pytest.approx(2, rel=0.1)
    assert rd_point["nominal_bits"] is None
    for record in found["points"]:
        rise = record["perplexity"] / record["reference_perplexity"] - 1
        assert record["rise_percent"] == pytest.approx(100 * rise)
        assert record["kl"] > 0
        assert record["seconds"] > 0
    assert rd_point["reference_nll"] == gptq["reference_nll"]
    assert (out / "sweep.png").read_bytes().startswith(PNG)
    text = (out / "sweep.md").read_text()
    assert [line.split(" | ")[0] for line in text.splitlines()[4:]] == [
        "| original",
        "| rd-2",
        "| gptq2",
    ]
    lines = (out / "points.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == found["points"]
    assert not [p for p in out.iterdir() if p.is_dir()]


def test_known_points_are_not_run_again(model, swept, monkeypatch):
    out, found = swept
    calls = []
    real = points.compress

    def counted(source, directory, settings, *rest):
        calls.append(settings.method)
        return real(source, directory, settings, *rest)

    monkeypatch.setattr(points, "compress", counted)
    again = _sweep(model, out, "--methods", "gptq2", "--json")
    assert calls == []
    assert json.loads(again.stdout.splitlines()[-1])["points"] == found["points"]
    more = _sweep(model, out, "--methods", "gptq2,rtn", "--keep")
    assert more.exit_code == 0
    assert calls == ["rtn"]
    (kept,) = [p for p in out.iterdir() if p.is_dir()]
    assert "| rtn | " in more.output
    _ternary_format_is_counted_on_stored_integers(kept)


def _ternary_format_is_counted_on_stored_integers(directory):
    container = Container.open(directory)
    bits, weights = 0, 0
    for path, layout in container.modules.items():
        stream = container.experts(path)
        weights += layout.weights
        for e in range(layout.experts):
            for j in range(len(layout.projections)):
                tables = stream.tables(e, j)
                codes = codec.decode_codes(tables, stream.matrix(e, j, tables))
                assert codes.codes.abs().max() <= 1
                bits += dictionary_bits([codes])
    assert nominal_bits(directory, "qmoe") == pytest.approx(bits / weights)
    assert nominal_bits(directory, "rd") is None
    # gate and up 2 x 96 rows of 64 inputs, down 64 rows of 96
    assert nominal_bits(directory, "gptq3") == pytest.approx(3 + 32 * 256 / (3 * 64 * 96))


def test_a_point_that_was_compressed_but_not_scored_is_only_scored(model, tmp_path, monkeypatch):
    source, text = model
    settings = Settings("rtn", str(text), calib_tokens=512, ctx=64, device="cpu")
    made = Points(str(source), tmp_path / "out", str(text), 256, 64)

    def failing(*args, **kwargs):
        raise QmoeError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(points, "evaluate", failing)
        with pytest.raises(QmoeError, match="stopped here"):
            made.measure(settings)
    assert made.records() == {}
    monkeypatch.setattr(points, "compress", failing)
    record = made.measure(settings)
    assert record["seconds"] is None
    assert list(made.records().values()) == [record]


def test_encoder_decoder_models_are_scored_on_masked_spans(tiny, tmp_path):
    source = tiny.save("switch_transformers", tmp_path / "source")
    tiny.save_tokenizer(source)
    text = tiny.save_text(tmp_path / "text.txt", 3000)
    settings = Settings("rtn", str(text), calib_tokens=512, ctx=64, device="cpu")
    record = Points(str(source), tmp_path / "out", str(text), 1024, 64).measure(settings)
    assert 0 < record["tokens"] < 512  # of 1,024 tokens, 15 % are masked
    assert record["nominal_bits"] > record["bits_per_weight"] / 2


@pytest.mark.parametrize("bits", ["", "0.8,", "0.8,x", "nan", "0.8;1", "0.1", "1,9", "-1"])
def test_a_bad_list_of_bits_ends_in_one_sentence(model, tmp_path, bits):
    result = _sweep(model, tmp_path / "out", bits=bits)
    assert result.exit_code == 2
    assert result.stderr.startswith("qmoe: --bits ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_lists():
    assert parse_bits("2, 0.4,2,1") == [0.4, 1.0, 2.0]
    assert parse_methods("gptq2,rtn,rtn") == ["rtn", "gptq2"]
    assert parse_methods("") == []
    with pytest.raises(QmoeError, match="'gptq5' is none of"):
        parse_methods("gptq5")


def test_a_damaged_record_is_named(model, swept, tmp_path):
    (tmp_path / "points.jsonl").write_text((swept[0] / "points.jsonl").read_text() + "{\n")
    with pytest.raises(CorruptError, match=r"line \d is no record"):
        Points(str(model[0]), tmp_path, str(model[1])).records()


def test_without_matplotlib_one_sentence(model, swept, monkeypatch):
    monkeypatch.delitem(sys.modules, "qmoe.measure.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [n for n in sys.modules if n.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    result = _sweep(model, swept[0], "--methods", "gptq2")
    assert result.exit_code == 0
    assert result.output.endswith(NO_MATPLOTLIB + "\n")


def test_knobs_reach_solver_target_and_manifest(model, tmp_path):
    source, text = model
    solver_options = {"drift": 0, "shrinkage": 0.0, "weighted": 0}
    settings = Settings(
        "rd", str(text), 2048, bits=2.0, ctx=64, device="cpu", solver_options=solver_options
    )
    assert point_name(settings) == "rd-2-drift=0-shrinkage=0-weighted=0"
    compress(str(source), tmp_path / "off", settings)
    container = Container.open(tmp_path / "off")
    assert container.manifest["settings"]["knobs"] == solver_options
    plain = Settings("rd", str(text), 2048, bits=2.0, ctx=64, device="cpu")
    compress(str(source), tmp_path / "on", plain)
    name = "model.layers.0.mlp.experts.stream"
    other = Container.open(tmp_path / "on").read(name)
    assert not torch.equal(container.read(name), other)


@pytest.mark.parametrize("solver_options", [{"unknown": 1}, {"drift": 2}, {"damping": -1}])
def test_bad_knobs_are_refused(model, tmp_path, solver_options):
    settings = Settings("rd", str(model[1]), 2048, ctx=64, solver_options=solver_options)
    with pytest.raises(QmoeError, match="rd does not take"):
        compress(str(model[0]), tmp_path / "out", settings)
    with pytest.raises(QmoeError, match="has no solver options"):
        compress(
            str(model[0]),
            tmp_path / "out",
            Settings("rtn", str(model[1]), 2048, solver_options={"drift": 0}),
        )


def test_each_ingredient_of_rd_can_be_left_out():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 32, generator=g) * torch.logspace(-1, 1, 32)
    x[:, 1:] += 0.7 * x[:, :-1]
    problem = Problem(
        torch.randn(1, 24, 32, generator=g), (x.T @ x)[None].double(), torch.tensor([300])
    )

    def damage(**solver_options):
        solved = get_method("rd", delta=10.0, drift=0.0, damping=0.0, **solver_options).solve(
            problem
        )
        error = problem.weight[0] - solved.matrices[0].dequantize()
        return ((error @ problem.hessian[0].float()) * error).sum(), solved.matrices[0]

    best, fine = damage()
    blind, _ = damage(feedback=False)
    assert blind > 1.2 * best
    equal, flat = damage(waterfill=False)
    assert equal > best
    assert flat.col_scale.unique().numel() == 1
    assert fine.col_scale.unique().numel() > 4
    assert not rd.method(weighted=0).weighted
    assert rd.method().weighted
