"""Several processes give the bytes of one, and a dead one ends the run in a sentence."""

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import Job, arguments, files, make_job, record, undisturbed

from qmoe.calib.activations import ActivationStore
from qmoe.compression.layer import _padded
from qmoe.compression.pipeline import compress
from qmoe.system.processes import World

EXPERTS = 40  # more than one group of experts per layer


@pytest.fixture(scope="module")
def job(tiny, tmp_path_factory) -> Job:
    """Layers with several groups of experts, and a target in bits."""
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 24}
    folder = tmp_path_factory.mktemp("job")
    source, settings = make_job(tiny, folder, num_local_experts=EXPERTS, **shape)
    return source, dataclasses.replace(settings, delta=None, bits=2.0)


@pytest.fixture(scope="module")
def expected(job, tmp_path_factory) -> dict[str, bytes]:
    """The files that one process writes."""
    return undisturbed(job, tmp_path_factory.mktemp("expected") / "out")


def test_few_tokens_give_the_same_outputs_with_more_threads():
    """MKL sums products of a few rows in another order when it has more threads."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(31, 256, generator=g), torch.randn(512, 256, generator=g)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append([(_padded(x[:n]) @ w.T)[:n] for n in range(1, 32)])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, x[: len(one)] @ w.T, rtol=1e-4, atol=1e-4)


def _torchrun(job, out: Path, processes: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    done = subprocess.run([*command, *arguments(job, out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("plan: read") == 1
    assert done.stdout.count("stored bits per weight") == 1


def test_two_processes_write_the_same_bytes(job, expected, tmp_path):
    _torchrun(job, tmp_path / "out", 2)
    assert files(tmp_path / "out") == expected


@pytest.mark.slow
@pytest.mark.parametrize("processes", [3, 4])
def test_more_processes_write_the_same_bytes(job, expected, tmp_path, processes):
    _torchrun(job, tmp_path / "out", processes)
    assert files(tmp_path / "out") == expected


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_a_dead_process_ends_the_run_and_one_process_finishes_it(job, expected, tmp_path):
    out, port = tmp_path / "out", _free_port()
    processes = []
    for rank in range(2):
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {k: str(v) for k, v in place.items()}
        processes.append(
            subprocess.Popen(
                [sys.executable, *arguments(job, out)],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    first, second = processes
    try:
        while not record(out, 0).exists():
            assert all(p.poll() is None for p in processes)
            time.sleep(0.002)
        second.send_signal(signal.SIGKILL)
        _, errors = first.communicate()
    finally:
        for p in processes:
            p.kill()
            p.wait()
    assert first.returncode == 2, errors
    last = errors.strip().splitlines()[-1]
    assert re.match(r"qmoe: process 0 of 2 lost contact with the others at: ", last)
    assert "continues at the first unfinished block" in last
    assert "Traceback" not in errors
    heard: list[str] = []
    compress(str(job[0]), out, job[1], say=heard.append)
    assert heard[2] == "1 of 2 blocks are finished; continuing at block model.layers.1"
    assert files(out) == expected


def test_alone_costs_nothing(tmp_path):
    world = World()
    assert world.first
    assert list(world.mine(5)) == [0, 1, 2, 3, 4]
    assert world.collect("x", "test") == ["x"]
    assert world.share(lambda: 7, "test") == 7
    world.meet("test")
    with ActivationStore(1 << 20, tmp_path) as store:
        t = store.shared(world, (4, 4), torch.float32)
        assert store.used == t.nbytes
    assert not torch.distributed.is_initialized()


def test_work_is_divided():
    for size in (1, 2, 3, 7):
        shares = [World(rank, size).mine(5) for rank in range(size)]
        assert sorted(i for share in shares for i in share) == [0, 1, 2, 3, 4]
