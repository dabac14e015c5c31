"""A target in stored bits per expert weight is met, whatever the model looks like."""

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmoe.compression.pipeline import compress
from qmoe.compression.rate import REHEARSAL_TOLERANCE, Controller, Curve, check_target, missed
from qmoe.compression.settings import Settings
from qmoe.errors import QmoeError
from qmoe.store.inspect import inspect

DELTAS = (1.0, 2.0, 4.0)


def _curve(path: str, weights: int, scale: float = 1.0) -> Curve:
    """Bits that halve with every doubling of the step."""
    return Curve(path, weights, DELTAS, tuple(scale * weights / d for d in DELTAS))


@pytest.fixture(scope="module")
def uneven(tiny, tmp_path_factory):
    """A random Mixtral whose layers and experts differ by orders of magnitude, and a text."""
    folder = tmp_path_factory.mktemp("uneven")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_local_experts": 8}
    source = tiny.save("mixtral", folder / "source", num_hidden_layers=3, **sizes)
    tiny.save_tokenizer(source)
    path = source / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if ".experts." in name and name.endswith(".w2.weight"):  # not w1: the gate keeps its range
            parts = name.split(".")
            tensor *= 4.0 ** (int(parts[2]) - 1) * (1 + int(parts[5]) / 4)
    save_file(tensors, path, metadata={"format": "pt"})
    return source, tiny.save_text(folder / "text.txt", 4000)


@pytest.fixture(scope="module")
def compressed_to(uneven, tmp_path_factory):
    """Compresses it to so many bits; once for every number of bits and of threads."""
    source, text = uneven
    folder = tmp_path_factory.mktemp("to")

    @cache
    def made(bits: float, threads: int = 1) -> Path:
        out, before = folder / f"{bits}-{threads}", torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            compress(str(source), out, Settings("rd", str(text), 3000, bits=bits, ctx=128))
        finally:
            torch.set_num_threads(before)
        return out

    return made


@pytest.mark.parametrize("bits", [0.7, 1.5, 3.0])
def test_targets_are_met(compressed_to, bits):
    assert inspect(compressed_to(bits)).bits_per_weight == pytest.approx(bits, rel=0.01)


def test_a_target_that_side_data_exceed_is_said_to_be_missed(tiny, tmp_path):
    source = tiny.save("mixtral", tmp_path / "source", num_hidden_layers=1, hidden_size=32)
    tiny.save_tokenizer(source)
    text, heard = tiny.save_text(tmp_path / "text.txt", 2000), []
    settings = Settings("rd", str(text), 1024, bits=0.25, ctx=128)
    report = compress(str(source), tmp_path / "out", settings, say=heard.append)
    assert report.sizes.bits_per_weight > 0.26
    assert heard[-1] == missed(0.25, report.sizes.bits_per_weight)
    assert heard[-1].startswith("--bits 0.25 is missed by +")
    assert not missed(0.8, 0.807)


def test_curve_goes_through_its_points_and_on():
    curve = _curve("a", 10)
    for delta in (0.25, 1.0, 1.5, 4.0, 32.0):
        assert curve.at(delta) == pytest.approx(10 / delta)


def test_curves_of_two_walks_are_one():
    near, far = _curve("a", 10), Curve("a", 10, (8.0, 16.0), (1.2, 0.6))
    merged = near.merged(far)
    assert merged.deltas == (1.0, 2.0, 4.0, 8.0, 16.0)
    assert merged.at(4.0) == near.at(4.0)
    assert merged.at(16.0) == 0.6


def test_later_modules_make_good_what_earlier_ones_took():
    curves = [_curve(str(i), 100) for i in range(10)]
    control = Controller(0.5, curves)
    took = 0.0
    for curve in curves:
        delta = control.delta()
        bits = 1.2 * curve.at(delta)  # predictions are a fifth too low, everywhere
        took += bits
        control.record(curve.path, bits, delta)
    assert took == pytest.approx(0.5 * 1000, rel=1e-6)


def test_last_module_is_tried_until_it_fits():
    curves = [_curve("a", 100), _curve("b", 100)]
    control = Controller(0.5, curves)
    assert not control.ends_with("a")
    delta = control.delta()
    control.record("a", 60.0, delta)
    assert control.ends_with("b")

    def real(delta: float) -> float:  # steeper than predicted, and far away
        return 300 * math.exp(-delta)

    tries: dict[float, float] = {}
    delta = control.delta()
    for _ in range(8):
        tries[delta] = real(delta)
        better = control.after("b", tries)
        if better is None:
            break
        delta = better
    assert abs(60 + real(delta) - 100) <= REHEARSAL_TOLERANCE * 100


def test_small_last_module_is_not_tried():
    control = Controller(0.5, [_curve("a", 1000), _curve("b", 10)])
    control.record("a", 500.0, 2.0)
    assert not control.ends_with("b")


@pytest.mark.parametrize("bits", [0.1, 6.0, float("nan")])
def test_impossible_targets_are_refused(bits):
    with pytest.raises(QmoeError, match="choose between"):
        check_target(bits)


def test_probe_does_not_depend_on_threads(compressed_to):
    one, two = compressed_to(1.5), compressed_to(1.5, threads=2)
    for file in one.glob("*.safetensors"):
        assert file.read_bytes() == (two / file.name).read_bytes()
