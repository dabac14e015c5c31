"""Bits as a token reads them, and experts of which little is left."""

import dataclasses
import json

import pytest
import torch

from qmoe.compression.pipeline import compress
from qmoe.store.inspect import bits_as_read, expert_bits, inspect
from qmoe.store.reader import Container


@pytest.fixture(scope="module")
def out(tmp_path_factory, tiny):
    from runs import make_job

    folder = tmp_path_factory.mktemp("inspect")
    source, settings = make_job(tiny, folder, hidden_size=64)
    compress(str(source), folder / "out", settings)
    return folder / "out"


def _with_tokens(container, tokens):
    """The same checkpoint, as if calibration had counted other tokens."""
    manifest = json.loads(json.dumps(container.manifest))
    for path, report in manifest["report"]["modules"].items():
        report["tokens"] = tokens(container.modules[path].experts)
    return dataclasses.replace(container, manifest=manifest)


def test_experts_together_take_what_is_stored(out):
    container = Container.open(out)
    bits = expert_bits(container)
    weights = {p: la.weights / la.experts for p, la in container.modules.items()}
    total = sum(float(b.sum()) * weights[p] for p, b in bits.items())
    found = inspect(out)
    assert total / found.expert_weights == pytest.approx(found.bits_per_weight, rel=1e-12)


def test_an_expert_takes_its_own_streams(out):
    container = Container.open(out)
    for path, bits in expert_bits(container).items():
        stream = container.experts(path)
        own = [
            sum(stream.matrix(e, j, stream.tables(e, j)).stored_bytes for j in range(3))
            if hasattr(stream.matrix(e, 0, stream.tables(e, 0)), "stored_bytes")
            else int((stream.offsets[e, :, 3] - stream.offsets[e, :, 2]).sum())
            for e in range(stream.layout.experts)
        ]
        size = stream.layout.weights / stream.layout.experts
        rest = bits - 8 * torch.tensor(own, dtype=torch.float64) / size
        assert (rest - rest[0]).abs().max() < 1e-9  # what experts share is divided evenly
        assert rest[0] > 0


def test_as_read_weighs_experts_by_their_tokens(out):
    container = Container.open(out)
    bits = expert_bits(container)
    even = _with_tokens(container, lambda n: [7] * n)
    assert bits_as_read(even, bits) == pytest.approx(inspect(out).bits_per_weight, rel=1e-12)
    first = _with_tokens(container, lambda n: [5] + [0] * (n - 1))
    assert bits_as_read(first, bits) == pytest.approx(
        sum(float(b[0]) for b in bits.values()) / len(bits)
    )
    mixed = _with_tokens(container, lambda n: [3, 1] + [0] * (n - 2))
    assert bits_as_read(mixed, bits) == pytest.approx(
        sum(float(0.75 * b[0] + 0.25 * b[1]) for b in bits.values()) / len(bits)
    )
    assert bits_as_read(_with_tokens(container, lambda n: None), bits) is None
    assert bits_as_read(_with_tokens(container, lambda n: [0] * n), bits) is None


def test_inspect_names_both(out, monkeypatch):
    found = inspect(out)
    own = bits_as_read(Container.open(out), expert_bits(Container.open(out)))
    assert found.bits_as_read == own
    assert "as read" in found.text()
    assert found.experts_nearly_erased == 0
    assert "less than" not in found.text()
    monkeypatch.setattr("qmoe.store.inspect.NEARLY_ERASED", 100.0)
    erased = inspect(out)
    assert erased.experts_nearly_erased == erased.experts
    assert f"{erased.experts} of {erased.experts} experts" in erased.text()
