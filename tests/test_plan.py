"""What a run needs, said before it begins: disk against a real run, dense bits, carried tensors,
and how the time depends on the work.
"""

import contextlib
import dataclasses
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from runs import make_job, opened

from qmoe.compression import pipeline
from qmoe.compression.dense import DenseCoder
from qmoe.compression.estimate import START, Speeds, Work, seconds
from qmoe.compression.pipeline import compress
from qmoe.compression.plan import Needs, make_plan
from qmoe.quantize import get_method
from qmoe.system.processes import World
from qmoe.types import ExpertsLayout, ProjectionShape

LAYOUT = ExpertsLayout(
    "m",
    "fused",
    64,
    (ProjectionShape("up", 1536, 2048, False), ProjectionShape("down", 2048, 768, True)),
)
WORK = Work(
    layouts=[LAYOUT] * 10,
    tokens=131072,
    batch=4096,
    context=1024,
    blocks=10,
    slots=4,
    streams=2,
    dense=2e8,
    outside=3e8,
    source=10**9,
    probed=False,
    coded=[],
)
SPEEDS = Speeds(product=5e10, solver=5e10, coder=2e7)


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory) -> Path:
    """A model whose embeddings and attention are worth coding."""
    shape = {"hidden_size": 256, "vocab_size": 2048, "num_attention_heads": 4}
    return make_job(tiny, tmp_path_factory.mktemp("plan"), **shape)[0]


def _plan(source: Path, dense_bits: float = 16, processes: int = 1) -> Needs:
    batches = [{"input_ids": torch.full((8, 128), 20)}] * 2
    job = opened(source, batches, bits=0.8)
    job = dataclasses.replace(job, world=World(size=processes))
    dense = DenseCoder(job, dense_bits) if dense_bits < 16 else None
    return make_plan(job, source / "out", dense)


def test_dense_bits_are_planned(source):
    plain, coded = _plan(source), _plan(source, 4)
    tables, attention = 2 * 2048 * 256, 3 * 3 * 256 * 256
    assert plain.write - coded.write == pytest.approx((tables + attention) * (4 - 0.5), rel=0.1)
    assert coded.floor > plain.floor
    assert coded.disk < plain.disk


def test_carried_tensors_are_planned(source, tiny, tmp_path):
    plain = _plan(source)
    shutil.copytree(source, tmp_path / "source")
    extra = {"model.layers.99.extra": torch.zeros(1000, 300, dtype=torch.bfloat16)}
    tiny.rewrite(tmp_path / "source", tiny.load_all(source) | extra)
    more = _plan(tmp_path / "source")
    assert more.write - plain.write == 600_000
    assert more.disk - plain.disk == 600_000


def test_processes_share_activations_in_files(source):
    alone, several = _plan(source), _plan(source, processes=2)
    assert several.disk - alone.disk == alone.activations


@pytest.mark.parametrize("bits", [None, 2.0])
def test_disk_of_a_real_run(tiny, tmp_path, monkeypatch, bits):
    shape = {"hidden_size": 128, "num_local_experts": 16, "num_hidden_layers": 4}
    source, settings = make_job(tiny, tmp_path, **shape)
    settings = dataclasses.replace(settings, bits=bits, delta=None if bits else 8.0)
    made: list[Needs] = []
    monkeypatch.setattr(pipeline, "make_plan", lambda *a: made.append(make_plan(*a)) or made[-1])
    folder = tmp_path / "disk"
    folder.mkdir()
    over, peak = threading.Event(), 0

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.002):
            total = 0
            for place, _, names in os.walk(folder):  # skips a folder that is renamed meanwhile
                for name in names:
                    with contextlib.suppress(FileNotFoundError):
                        total += os.stat(os.path.join(place, name)).st_blocks * 512
            peak = max(peak, total)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        compress(str(source), folder / "out", settings)
    finally:
        over.set()
        thread.join()
    written = sum(p.stat().st_size for p in (folder / "out").iterdir())
    small = 1 << 19  # journal, manifest, tokenizer, and the file system's blocks
    assert peak < 1.2 * made[0].disk + small
    assert peak > 0.5 * made[0].disk
    assert written == pytest.approx(made[0].write + small / 4, rel=0.4)


def test_time_follows_the_work():
    def time(**changes: object) -> float:
        return seconds(dataclasses.replace(WORK, **changes), SPEEDS) - START

    plain = time()
    assert time(layouts=[LAYOUT] * 20, blocks=20, dense=4e8, source=2 * 10**9) == pytest.approx(
        2 * plain
    )
    assert time(streams=1) < plain < time(tokens=4 * WORK.tokens) < 4 * plain
    assert plain < time(probed=True) < 2 * plain
    assert time(coded=[(2048, 2048)] * 40) > plain

    def ratio(modules: int) -> float:
        of = {"layouts": [LAYOUT] * modules, "blocks": modules, "dense": 0.0}
        return time(**of, probed=True) / time(**of)

    assert ratio(2) > 1.5 > ratio(40)  # the last one of few is rehearsed


def test_speeds_are_those_of_the_shapes():
    speeds = Speeds.measured(get_method("rd"), [LAYOUT], torch.device("cpu"))
    assert 1e8 < speeds.solver < 1e14
    assert 1e8 < speeds.product < 1e15
    assert 1e4 < speeds.coder < 1e11


@pytest.mark.parametrize(
    ("time", "words"),
    [(46.4, "about 46 s on"), (119.0, "about 119 s on"), (150.0, "about 2 min on")],
)
def test_short_times_are_seconds(time, words):
    assert words in Needs(1, 1, 1, 1, 1, 1, 1, time).text()
