"""Bits as a token reads them, and experts of which little is left."""

import dataclasses
import json

import pytest

from qmoe.compression.pipeline import compress
from qmoe.store.coverage import coverage, expert_bits
from qmoe.store.inspect import inspect
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


def test_as_read_weighs_experts_by_their_tokens(out):
    container = Container.open(out)
    bits = {path: expert_bits(container, path) for path in container.modules}

    def as_read(tokens):
        return coverage(_with_tokens(container, tokens)).bits_as_read

    even = sum(float(b.mean()) for b in bits.values()) / len(bits)
    assert as_read(lambda n: [7] * n) == pytest.approx(even)
    assert as_read(lambda n: [5] + [0] * (n - 1)) == pytest.approx(
        sum(float(b[0]) for b in bits.values()) / len(bits)
    )
    assert as_read(lambda n: [3, 1] + [0] * (n - 2)) == pytest.approx(
        sum(float(0.75 * b[0] + 0.25 * b[1]) for b in bits.values()) / len(bits)
    )
    assert as_read(lambda n: None) is None
    assert as_read(lambda n: [0] * n) is None


def test_inspect_names_the_experts_of_which_little_is_left(out, monkeypatch):
    found = inspect(out)
    assert found.bits_as_read == coverage(Container.open(out)).bits_as_read
    assert "as read" in found.text()
    assert not found.below_floor
    monkeypatch.setattr("qmoe.store.coverage.FLOOR", 100.0)
    erased = inspect(out)
    assert sum(map(len, erased.below_floor.values())) == erased.experts
    assert f"{erased.experts} experts have less than 100 bit" in erased.text()
