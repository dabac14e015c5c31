"""Memory has a bound that is known before a run, and nothing grows with the model."""

import json
import os
import platform
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from runs import make_job, opened

from qmoe.calib.activations import ActivationStore
from qmoe.compression.blocks import BlockLoop
from qmoe.compression.pipeline import compress
from qmoe.compression.plan import make_plan
from qmoe.compression.settings import Settings
from qmoe.errors import CapacityError
from qmoe.models.streamed import StreamedModel
from qmoe.source.checkpoint import open_checkpoint
from qmoe.system import heap


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_store_keeps_to_its_budget_and_gives_it_back(tmp_path):
    with ActivationStore(1000, tmp_path) as store:
        first = store.empty((200,), torch.float32)
        second = store.empty((100,), torch.float32)
        assert (store.used, store.spilled) == (800, 400)
        second[:] = torch.arange(100.0)
        store.release(second)
        assert store.used == 800
        store.release(first)
        assert store.used == 0
        kept = store.keep(torch.arange(250.0))
        assert store.used == 1000
        assert torch.equal(kept, torch.arange(250.0))
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(second, torch.arange(100.0))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_trimmed_tensors_leave_memory_but_not_the_values(tmp_path):
    size = 96 << 20
    with ActivationStore(0, tmp_path) as store:
        before = _resident()
        t = store.empty((size // 4,), torch.float32)
        t[:] = torch.arange(size // 4, dtype=torch.float32)
        assert _resident() - before > size * 0.9
        store.trim()
        assert _resident() - before < size * 0.1
        assert torch.equal(t[::1001], torch.arange(0, size // 4, 1001, dtype=torch.float32))


def test_holes_of_the_heap_are_given_back_where_the_c_library_can():
    can = platform.libc_ver()[0] == "glibc"
    size, count = 20_000, 5_000
    blocks = [bytearray(b"x") * size for _ in range(count)]
    kept = blocks[::50]  # holes between what lives on
    full = _resident() if can else 0
    del blocks
    assert heap.trim() == can
    assert not can or full - _resident() > size * count // 2
    assert all(block == bytearray(b"x") * size for block in kept)


def test_no_tensor_outlives_being_stored(tiny, tmp_path, monkeypatch):
    stored, alive, dense, block = [], [], StreamedModel.dense, BlockLoop.block

    def watched_dense(self, want):
        for name, tensor in dense(self, want):
            # a copy, as where the source is not in float32: else it lives on in the model
            copy = tensor.clone()
            stored.append((name, weakref.ref(copy)))
            yield name, copy
            del copy

    def watched_block(self, *args):
        alive.extend(name for name, ref in stored if ref() is not None)
        block(self, *args)
        alive.extend(name for name, ref in stored if ref() is not None)

    monkeypatch.setattr(StreamedModel, "dense", watched_dense)
    monkeypatch.setattr(BlockLoop, "block", watched_block)
    source, settings = make_job(tiny, tmp_path)
    compress(str(source), tmp_path / "out", settings)
    assert len(stored) > 4
    assert alive == []


@pytest.fixture(scope="module")
def make(tiny, tmp_path_factory):
    """``make(blocks, experts)``: a checkpoint of 3 x 256 x 128 weights per expert, and its text."""

    def get(blocks: int, experts: int) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("model")
        shape = {"hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": blocks}
        source = folder / "source"
        tiny.save("mixtral", source, torch.bfloat16, num_local_experts=experts, **shape)
        tiny.save_tokenizer(source)
        return source, tiny.save_text(folder / "text.txt", 2500)

    return get


def _peak(make, blocks: int, experts: int, out: Path) -> tuple[int, int]:
    """(peak of a process of its own, what the plan said), in bytes."""
    source, text = make(blocks, experts)
    command = [sys.executable, "-m", "qmoe", "compress", str(source), str(out)]
    options = ["--method", "qmoe", "--calib", str(text), "--calib-tokens", "2048", "--ctx", "128"]
    done = subprocess.run(
        [*command, *options, "--json"], capture_output=True, text=True, check=True
    )
    words = done.stderr.split("memory ")[1].split()
    planned = float(words[0]) * {"MiB": 2**20, "GiB": 2**30}[words[1]]
    return json.loads(done.stdout.strip().splitlines()[-1])["peak_rss_bytes"], int(planned)


def test_peak_does_not_grow_with_blocks(make, tmp_path):
    few, planned = _peak(make, 2, 48, tmp_path / "few")
    many, _ = _peak(make, 10, 48, tmp_path / "many")
    block = 48 * 3 * 256 * 128 * 4
    assert many - few < 2 * block  # eight blocks more
    assert max(few, many) < planned * 1.15


def test_too_little_memory_is_refused_with_both_numbers(make, tmp_path):
    source, text = make(1, 4)
    settings = Settings(method="qmoe", calib=str(text), calib_tokens=512, ctx=128, memory=64 << 20)
    with pytest.raises(CapacityError, match=r"--memory 64\.0 MiB is too little.*pass --memory"):
        compress(str(source), tmp_path / "out", settings)
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_is_refused_with_both_numbers(make, tmp_path):
    source, _ = make(1, 4)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        batch = {"input_ids": torch.zeros(8, 512, dtype=torch.long)}
        job = opened(source, [batch], method="qmoe")
        with pytest.raises(CapacityError, match=r"has 1\.0 MiB free, this run needs .*MiB"):
            make_plan(job, disk / "a" / "out")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_plan_grows_with_what_it_depends_on(make, tmp_path):
    source, _ = make(2, 8)

    def plan(tokens: int, memory: int = 8 << 30):
        batches = [{"input_ids": torch.zeros(1, 1024, dtype=torch.long)}] * (tokens // 1024)
        return make_plan(opened(source, batches, bits=0.8, memory=memory), tmp_path / "out")

    few, many = plan(1 << 10), plan(1 << 20)
    assert many.activations > 500 * few.activations
    assert many.floor < few.floor * 1.2
    assert many.disk > few.disk
    tight = plan(1 << 20, many.floor + (64 << 20))
    assert tight.peak < many.peak
    assert tight.disk > many.disk
    assert few.read == open_checkpoint(str(source)).source_bytes
    assert few.text().startswith("plan: read ")
