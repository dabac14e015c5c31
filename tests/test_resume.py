"""Runs that are interrupted at any moment, by anything, go on and give the same bytes."""

import dataclasses
import errno
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest
from runs import Job, arguments, files, make_job, record, undisturbed, when

from qmoe.compression import pipeline, plan
from qmoe.compression.pipeline import compress
from qmoe.errors import InterruptedRunError, OutputError, SourceError
from qmoe.store.writer import ContainerWriter

BLOCKS = 4


@pytest.fixture(scope="module")
def job(tiny, tmp_path_factory) -> Job:
    """Four blocks in two shards."""
    return make_job(tiny, tmp_path_factory.mktemp("job"), shards=2, num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def expected(job, tmp_path_factory) -> dict[str, bytes]:
    """The files of a run that nothing disturbed."""
    return undisturbed(job, tmp_path_factory.mktemp("expected") / "out")


def _interrupt(job, out: Path, block: int = 1) -> str:
    """Presses ctrl-C when a block is durable; returns the message."""
    with (
        when(record(out, block), lambda: os.kill(os.getpid(), signal.SIGINT)),
        pytest.raises(InterruptedRunError) as caught,
    ):
        compress(str(job[0]), out, job[1])
    return str(caught.value)


def test_goes_on_after_ctrl_c(job, expected, tmp_path):
    out = tmp_path / "out"
    message = _interrupt(job, out)
    assert "interrupted; the same command continues at block model.layers." in message
    assert not out.exists()
    before = {p.name: p.stat().st_mtime_ns for p in record(out, 0).parent.iterdir()}
    heard: list[str] = []
    compress(str(job[0]), out, job[1], say=heard.append)
    assert heard[0].startswith("calibration text: ")
    assert heard[1].startswith("plan: read")
    where = message.rsplit(" ", 1)[1]
    done = int(where.rsplit(".", 1)[1])
    assert heard[2] == f"{done} of {BLOCKS} blocks are finished; continuing at block {where}"
    assert {"rest.json", "model.layers.0.json", "model.layers.1.json"} <= before.keys()
    assert files(out) == expected
    assert not out.with_name("out.partial").exists()


def test_finished_blocks_are_not_made_again(job, tmp_path):
    out = tmp_path / "out"
    _interrupt(job, out)
    written = record(out, 0).stat().st_mtime_ns
    _interrupt(job, out, block=2)
    assert record(out, 0).stat().st_mtime_ns == written


@pytest.mark.parametrize("damage", ["remove", "flip", "cut"])
def test_lost_activations_are_made_again(job, expected, tmp_path, damage):
    out = tmp_path / "out"
    _interrupt(job, out)
    state = out.with_name("out.partial") / "work" / "state" / "original"
    for path in [p for folder in state.iterdir() for p in folder.iterdir()]:
        data = bytearray(path.read_bytes())
        if damage == "flip":
            data[len(data) // 2] ^= 1
        path.unlink() if damage == "remove" else path.write_bytes(
            data[:-7] if damage == "cut" else data
        )
    heard: list[str] = []
    compress(str(job[0]), out, job[1], say=heard.append)
    assert "are missing or damaged; going back to block model.layers.0" in heard[2]
    assert files(out) == expected


def test_changed_settings_and_sources_are_refused(job, tiny, tmp_path):
    out = tmp_path / "out"
    _interrupt(job, out)
    source, settings = job
    other = dataclasses.replace(settings, delta=9.0)
    with pytest.raises(OutputError, match=r"begun with delta = 8\.0, this run has 9\.0.*--fresh"):
        compress(str(source), out, other)
    changed = tmp_path / "changed"
    shutil.copytree(source, changed)
    weights = tiny.load_all(changed)
    weights["lm_head.weight"][-1, -1] += 1
    weights["model.norm.weight"][-1] += 1
    tiny.rewrite(changed, weights)
    (changed / "model.safetensors.index.json").unlink(missing_ok=True)
    with pytest.raises(OutputError, match=r"begun with source = .*fingerprint.*this run has"):
        compress(str(changed), out, settings)
    fresh = dataclasses.replace(other, fresh=True)
    compress(str(source), out, fresh)
    assert out.is_dir()


def test_memory_does_not_change_the_bytes(job, expected, tmp_path, monkeypatch):
    source, settings = job
    _interrupt(job, tmp_path / "out")
    # Of the whole test suite, which may have grown by any amount; the run itself needs little.
    monkeypatch.setattr(plan, "_resident", lambda: 0)
    monkeypatch.setattr(plan, "_CODE", 0)
    made = []
    make = plan.make_plan
    monkeypatch.setattr(pipeline, "make_plan", lambda *a: made.append(make(*a)) or made[-1])
    small = dataclasses.replace(settings, memory=18 << 20)
    compress(str(source), tmp_path / "out", small)
    assert made[0].activations > made[0].store  # the rest lay in mapped files
    assert files(tmp_path / "out") == expected


def test_second_run_on_the_same_output_is_refused(job, tmp_path):
    with (
        ContainerWriter(tmp_path / "out"),
        pytest.raises(OutputError, match="another run is writing"),
    ):
        compress(str(job[0]), tmp_path / "out", job[1])


def _kill_chain(job, expected, folder: Path, kills: int, seed: int) -> None:
    """Kills runs at random moments, restarting each where it was, until `kills` have died."""
    rng = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qmoe.compression.pipeline"])

    def start(out: Path) -> multiprocessing.Process:
        process = context.Process(target=compress, args=(str(job[0]), out, job[1]))
        process.start()
        return process

    for out in (folder / "first", folder / "0"):  # the first one waits for the server's imports
        begun = time.monotonic()
        process = start(out)
        process.join()
        assert process.exitcode == 0
        duration = time.monotonic() - begun
    died = finished = 0
    while died < kills:
        out = folder / f"{seed}-{finished + 1}"
        process = start(out)
        process.join(rng.uniform(0.05, 1.1) * duration)
        if process.is_alive():
            process.kill()
            process.join()
            died += 1
        if out.exists():
            assert files(out) == expected
            finished += 1
    out = folder / f"{seed}-{finished + 1}"
    if not out.exists():
        compress(str(job[0]), out, job[1])
    assert files(out) == expected
    assert files(folder / "0") == expected


def test_kill_at_random_moments(job, expected, tmp_path):
    _kill_chain(job, expected, tmp_path, kills=3, seed=1)


@pytest.mark.slow
def test_twenty_kills(job, expected, tmp_path):
    _kill_chain(job, expected, tmp_path, kills=20, seed=2)


def test_ctrl_c_on_the_command_line_in_another_locale(job, expected, tmp_path):
    out = tmp_path / "out"
    odd = {"LC_ALL": "C", "LANG": "", "TZ": "Asia/Kathmandu", "PYTHONUTF8": "0"}
    process = subprocess.Popen(
        [sys.executable, *arguments(job, out)],
        env=os.environ | odd,
        stderr=subprocess.PIPE,
        text=True,
    )
    with when(record(out, 0), lambda: process.send_signal(signal.SIGINT)):
        _, errors = process.communicate()
    assert process.returncode == 130
    last = errors.strip().splitlines()[-1]
    assert last.startswith("qmoe: interrupted; the same command continues at block model.layers.")
    assert "Traceback" not in errors
    compress(str(job[0]), out, job[1])
    assert files(out) == expected


@contextmanager
def _small_disk(folder: Path, size: int):
    """A tmpfs of a few MiB, where the system lets us mount one."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _write_without_end(file: BinaryIO) -> None:
    while True:
        file.write(bytes(4096))


def test_full_disk(job, expected, tmp_path):
    disk = tmp_path / "disk"
    with _small_disk(disk, 40 << 20):
        out, filler = disk / "out", disk / "filler"

        def fill() -> None:
            with filler.open("wb", buffering=0) as f, pytest.raises(OSError, match="No space"):
                _write_without_end(f)

        with (
            when(record(out, 0), fill),
            pytest.raises(OutputError, match=r"no space left|no room for"),
        ):
            compress(str(job[0]), out, job[1])
        filler.unlink()
        heard: list[str] = []
        compress(str(job[0]), out, job[1], say=heard.append)
        assert "blocks are finished; continuing at block" in heard[2]
        assert files(out) == expected


def test_file_size_limit(job, expected, tmp_path):
    import resource

    out = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 10, before[1]))
    try:
        with pytest.raises(OutputError, match=r"exceed the file size limit|no room for"):
            compress(str(job[0]), out, job[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    compress(str(job[0]), out, job[1])
    assert files(out) == expected


def test_read_error_in_a_shard(job, expected, tmp_path, monkeypatch):
    out, read = tmp_path / "out", os.preadv

    def failing(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with (
        when(record(out, 0), lambda: monkeypatch.setattr(os, "preadv", failing)),
        pytest.raises(SourceError, match=r"read error in .*Input/output error"),
    ):
        compress(str(job[0]), out, job[1])
    monkeypatch.setattr(os, "preadv", read)
    compress(str(job[0]), out, job[1])
    assert files(out) == expected


def test_shard_that_is_replaced_under_the_run(job, expected, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(job[0], source)
    shard = sorted(source.glob("*.safetensors"))[0]
    right = shard.read_bytes()

    def replace() -> None:
        data = bytearray(right)
        data[-1000] ^= 0x40
        other = shard.with_suffix(".new")
        other.write_bytes(data)
        os.replace(other, shard)

    with (
        when(record(out, 0), replace),
        pytest.raises(SourceError, match="changed while it was being read"),
    ):
        compress(str(source), out, job[1])
    shard.write_bytes(right)
    compress(str(source), out, job[1])
    assert files(out) == expected


def test_clock_that_jumps_back(job, expected, tmp_path, monkeypatch):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(job[0], source)
    later = (4e9, 4e9)  # in the year 2096
    for path in source.iterdir():
        os.utime(path, later)
    _interrupt((source, job[1]), out)
    for path in out.with_name("out.partial").rglob("*"):
        os.utime(path, later)
    now = itertools.count(1e9, -3600)
    monkeypatch.setattr(time, "time", lambda: next(now))
    heard: list[str] = []
    compress(str(source), out, job[1], say=heard.append)
    assert "blocks are finished; continuing at block" in heard[2]
    assert files(out) == expected


@contextmanager
def _nobody():
    """Without root's right to read and write everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def open_job(job):
    """The job in a folder that everybody may read, and that folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        source = folder / "source"
        shutil.copytree(job[0], source)
        for path in source.iterdir():
            path.chmod(0o644)
        text = shutil.copy(job[1].calib, folder / "text.txt")
        yield source, dataclasses.replace(job[1], calib=str(text)), folder


def test_output_that_may_not_be_written(open_job):
    source, settings, folder = open_job
    closed = folder / "closed"
    closed.mkdir(mode=0o555)
    with _nobody(), pytest.raises(OutputError, match="no permission to write"):
        compress(str(source), closed / "out", settings)
    assert list(closed.iterdir()) == []


def test_shard_that_may_not_be_read(open_job):
    source, settings, folder = open_job
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.chmod(0o000)
    with _nobody(), pytest.raises(SourceError, match=rf"{shard.name}.*[Pp]ermission denied"):
        compress(str(source), folder / "out", settings)
    assert not (folder / "out").exists()
