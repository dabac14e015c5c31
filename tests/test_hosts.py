"""Processes that see neither one another's files nor mappings: the bytes of one process."""

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import Job, arguments, files, make_job, record, undisturbed


@pytest.fixture(scope="module")
def job(tiny, tmp_path_factory) -> Job:
    """Layers with several groups of experts, and a target in bits."""
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 24}
    folder = tmp_path_factory.mktemp("job")
    source, settings = make_job(tiny, folder, num_local_experts=40, **shape)
    return source, dataclasses.replace(settings, delta=None, bits=2.0)


@pytest.fixture(scope="module")
def expected(job, tmp_path_factory) -> dict[str, bytes]:
    """The files that one process writes."""
    return undisturbed(job, tmp_path_factory.mktemp("expected") / "out")


def _start(job, folders: list[Path], *more: str) -> list[subprocess.Popen]:
    """One process a folder, each told that it is alone on its machine; OUT is relative."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []
    for rank, folder in enumerate(folders):
        place = {"RANK": rank, "WORLD_SIZE": len(folders), "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {k: str(v) for k, v in place.items()}
        command = [sys.executable, *arguments(job, Path("out")), *more]
        found.append(
            subprocess.Popen(
                command, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True
            )
        )
    return found


def _folders(tmp_path, count) -> list[Path]:
    out = [tmp_path / f"host{i}" for i in range(count)]
    for folder in out:
        folder.mkdir()
    return out


def _wait(processes: list[subprocess.Popen]) -> None:
    for p in processes:
        _, errors = p.communicate()
        assert p.returncode == 0, errors


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_folders_of_their_own_give_the_same_bytes(job, expected, tmp_path, count):
    folders = _folders(tmp_path, count)
    _wait(_start(job, folders))
    assert files(folders[0] / "out") == expected
    for folder in folders[1:]:
        assert [*folder.iterdir()] == []  # nothing is left behind


def test_one_folder_is_used_by_all_that_see_it(job, expected, tmp_path):
    """Two machines with a coherent file system: nothing has to be sent."""
    _wait(_start(job, [tmp_path, tmp_path]))
    assert files(tmp_path / "out") == expected


def test_a_lost_machine_and_the_same_command_again(job, expected, tmp_path):
    folders = _folders(tmp_path, 2)
    first, second = _start(job, folders)
    try:
        while not record(folders[0] / "out", 0).exists():
            assert first.poll() is None
            time.sleep(0.002)
        second.send_signal(signal.SIGKILL)
        _, errors = first.communicate()
    finally:
        for p in (first, second):
            p.kill()
            p.wait()
    assert first.returncode == 2, errors
    assert "lost contact with the others" in errors
    _wait(_start(job, folders))
    assert files(folders[0] / "out") == expected


def test_dense_bits_want_shared_files(job, tmp_path):
    processes = _start(job, _folders(tmp_path, 2), "--dense-bits", "8")
    for p in processes:
        _, errors = p.communicate()
        assert p.returncode == 2, errors
    assert "--dense-bits on several machines" in errors


def _ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True).returncode == 0


@pytest.fixture
def hosts():
    """Two network namespaces joined by a cable; each is a machine with its own loopback."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"qmoe-{os.getpid()}-{i}" for i in range(2)]
    ends = [f"q{os.getpid() % 100000}{i}" for i in "ab"]
    if not all(_ip("netns", "add", name) for name in names):
        pytest.skip("this system makes no network namespaces")
    try:
        assert _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for i, (name, end) in enumerate(zip(names, ends, strict=True)):
            assert _ip("link", "set", end, "netns", name)
            assert _ip("-n", name, "addr", "add", f"10.213.77.{i + 1}/24", "dev", end)
            assert _ip("-n", name, "link", "set", end, "up")
            assert _ip("-n", name, "link", "set", "lo", "up")
        yield list(zip(names, ends, strict=True))
    finally:
        for name in names:
            _ip("netns", "delete", name)


def test_torchrun_over_two_hosts(job, expected, tmp_path, hosts):
    folders, processes = _folders(tmp_path, 2), []
    for rank, ((name, end), folder) in enumerate(zip(hosts, folders, strict=True)):
        launch = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
        launch += ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(rank)]
        launch += ["--master-addr", "10.213.77.1", "--master-port", "29517"]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": end, "TP_SOCKET_IFNAME": end}
        command = [*launch, *arguments(job, Path("out"))]
        processes.append(
            subprocess.Popen(
                command, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True
            )
        )
    _wait(processes)
    assert files(folders[0] / "out") == expected
    assert not (folders[1] / "out").exists()
