"""Writing compressed checkpoints: atomic, durable, deterministic, resumed after any failure."""

import os
import resource
import subprocess
import sys

import pytest
import torch
from container_parts import FINISH, LAYOUT, fill, make, matrix, tree
from safetensors.torch import load_file

from qmoe.compression.coding import encode_experts
from qmoe.errors import OutputError
from qmoe.store.manifest import MANIFEST
from qmoe.store.reader import Container
from qmoe.store.writer import INDEX, ContainerWriter, carried_files
from qmoe.system.tensors import read_header
from qmoe.types import QuantizedMatrix


def _interrupted(writer):
    with writer.block("rest") as block:
        block.add_tensor("rest.w", torch.zeros(3))
        raise KeyboardInterrupt


def test_bytes_depend_on_the_input_only(tmp_path, monkeypatch):
    a = tree(make(tmp_path / "a"))
    monkeypatch.setenv("LC_ALL", "tr_TR.UTF-8")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert a == tree(make(tmp_path / "elsewhere" / "b"))
    assert set(a) == {
        "config.json",
        INDEX,
        MANIFEST,
        "qmoe-m.safetensors",
        "qmoe-rest.safetensors",
    }
    assert not list(tmp_path.glob("*.partial"))


def test_the_safetensors_library_reads_the_same(tmp_path):
    container = Container.open(make(tmp_path / "a"))
    seen = {}
    for path in container.directory.glob("*.safetensors"):
        seen |= load_file(path)
    assert seen.keys() == container.tensors.keys()
    for name, tensor in seen.items():
        ours = container.read(name)
        assert ours.dtype == tensor.dtype
        assert torch.equal(ours, tensor)
    assert seen["m.scalar"] == 4
    streams = container.experts("m.experts")
    for e in range(2):
        assert torch.equal(streams.dense(e, 0), matrix(e).dequantize())
    assert container.dense_names() == [n for n in container.tensors if "experts" not in n]


def test_report_counts_bytes_and_zeros(tmp_path):
    container = Container.open(make(tmp_path / "a"))
    report = container.manifest["report"]["modules"]["m.experts"]
    up = report["projections"]["up"]
    assert report["tokens"] == [5, 0]
    assert up["bytes"] == container.tensors["m.experts.stream"][2].shape[0]
    assert up["zeros"] == sum(int((matrix(e).codes == 0).sum()) for e in range(2))
    assert up["weights"] == 2 * 8 * 16


@pytest.mark.parametrize("limit", [1, 40, 200, 10_000])
def test_shards_are_bounded(tmp_path, limit):
    container = Container.open(make(tmp_path / "a", max_shard_bytes=limit))
    for path in container.directory.glob("*.safetensors"):
        start, entries = read_header(path)
        size = path.stat().st_size - start
        assert size <= limit or sum(e.end > e.begin for e in entries.values()) == 1
    assert torch.equal(container.experts("m.experts").dense(1, 0), matrix(1).dequantize())


def test_resume_keeps_finished_blocks_and_gives_the_same_bytes(tmp_path):
    whole = tree(make(tmp_path / "a"))
    out = tmp_path / "b"
    with ContainerWriter(out, job={"seed": 1}) as writer:
        fill(writer, "m", 0)
        with pytest.raises(KeyboardInterrupt):
            _interrupted(writer)
    assert not out.exists()
    before = (tmp_path / "b.partial/data/qmoe-m.safetensors").stat().st_mtime_ns
    with ContainerWriter(out, job={"seed": 1}, resume=True) as writer:
        assert writer.finished_blocks() == {"m": {"seed": 0}}
        with pytest.raises(ValueError, match="are not finished"):
            writer.finish(["m", "rest"], **FINISH)
        fill(writer, "rest", 1)
        writer.finish(["m", "rest"], **FINISH)
    assert tree(out) == whole
    assert (out / "qmoe-m.safetensors").stat().st_mtime_ns == before


class Crash(BaseException):
    """Power loss: nothing after it runs, no handler knows it."""


def test_a_crash_at_every_step_is_resumed(tmp_path, monkeypatch):
    """Dies at the k-th rename, sync or removal, for every k; OUT is complete or absent, the end is
    the same."""
    whole = tree(make(tmp_path / "whole"))
    left = None  # steps until the crash
    real = {name: getattr(os, name) for name in ("replace", "rename", "fsync", "unlink", "rmdir")}

    def dying(name):
        def step(*args, **kwargs):
            nonlocal left
            if left is not None:
                left -= 1
                if left < 0:
                    raise Crash
            return real[name](*args, **kwargs)

        return step

    for name in real:
        monkeypatch.setattr(os, name, dying(name))
    crashes = 0
    for k in range(200):
        out = tmp_path / f"out{k}"
        left = k
        try:
            make(out)
            break  # lived to the end
        except Crash:
            crashes += 1
        left = None
        if out.exists():
            assert tree(out) == whole
            continue
        with ContainerWriter(out, resume=True) as writer:
            for i, name in enumerate(("m", "rest")):
                if name not in writer.finished_blocks():
                    fill(writer, name, i)
            writer.finish(["m", "rest"], **FINISH)
        assert tree(out) == whole
    assert 10 < crashes < 200


def test_resume_after_damage_writes_the_block_again(tmp_path):
    out = tmp_path / "a"
    with ContainerWriter(out) as writer:
        fill(writer, "m")
        fill(writer, "rest")
    shard = tmp_path / "a.partial/data/qmoe-m.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x99")
    with ContainerWriter(out, resume=True) as writer:
        assert set(writer.finished_blocks()) == {"rest"}
    (tmp_path / "a.partial/journal/rest.json").write_bytes(b"{")
    with ContainerWriter(out, resume=True) as writer:
        assert writer.finished_blocks() == {}


def test_starting_over_forgets(tmp_path):
    with ContainerWriter(tmp_path / "a") as writer:
        fill(writer, "m")
    with ContainerWriter(tmp_path / "a") as writer:
        assert writer.finished_blocks() == {}
        writer.discard()
    assert not list(tmp_path.iterdir())


def test_another_job_is_refused_with_both_values(tmp_path):
    ContainerWriter(tmp_path / "a", job={"bits": 0.8}).close()
    with pytest.raises(OutputError, match=r"bits = 0\.8, this run has 1\.0; .*--fresh"):
        ContainerWriter(tmp_path / "a", job={"bits": 1.0}, resume=True)
    ContainerWriter(tmp_path / "a", job={"bits": 1.0}).discard()


def test_two_runs_on_one_directory(tmp_path):
    with (
        ContainerWriter(tmp_path / "a"),
        pytest.raises(OutputError, match="another run is writing"),
    ):
        ContainerWriter(tmp_path / "a", resume=True)
    ContainerWriter(tmp_path / "a").discard()


def test_an_existing_output_is_refused_and_untouched(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/note").write_text("mine")
    (tmp_path / "f").write_text("mine")
    for name in ("a", "f"):
        with pytest.raises(OutputError, match="already exists"):
            ContainerWriter(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "f"]
    (tmp_path / "empty").mkdir()
    assert Container.open(make(tmp_path / "empty"))


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        ContainerWriter(tmp_path / "file" / "out")
    with pytest.raises(OutputError, match=r"(no permission to|cannot) write"):
        ContainerWriter("/proc/qmoe/out")


def test_no_permission(tmp_path):
    """In a process of its own, without root's right to write everywhere."""
    (tmp_path / "locked").mkdir(mode=0o555)
    os.chmod(tmp_path / "locked", 0o555)
    code = f"""
import ctypes, os
if os.geteuid() == 0:  # drop CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH from the effective set
    class Header(ctypes.Structure): _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]
    class Data(ctypes.Structure): _fields_ = [(k, ctypes.c_uint32) for k in "epi"]
    libc, header, data = ctypes.CDLL(None), Header(0x20080522, 0), (Data * 2)()
    assert libc.capget(ctypes.byref(header), data) == 0
    data[0].e &= ~6
    assert libc.capset(ctypes.byref(header), data) == 0
from qmoe.store.writer import ContainerWriter
from qmoe.errors import OutputError
try:
    ContainerWriter({str(tmp_path / "locked" / "out")!r})
except OutputError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "no permission to write" in done.stdout, done.stderr


def test_a_full_disk_leaves_nothing_visible_and_is_resumed(tmp_path):
    """A file size limit fails as a full disk does: in the middle of a write."""
    out = tmp_path / "a"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ContainerWriter(out) as writer:
        fill(writer, "m", 0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
        try:
            with (
                pytest.raises(OutputError, match="limit") as caught,
                writer.block("rest") as block,
            ):
                block.add_tensor("rest.big", torch.zeros(100_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    with ContainerWriter(out, resume=True) as writer:
        assert set(writer.finished_blocks()) == {"m"}
        fill(writer, "rest", 1)
        writer.finish(["m", "rest"], **FINISH)
    assert tree(out) == tree(make(tmp_path / "b"))


@pytest.fixture
def small_disk(tmp_path):
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(where)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root; the file size limit above runs everywhere")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def test_no_space_left(small_disk):
    with ContainerWriter(small_disk / "a") as writer:
        with pytest.raises(OutputError, match="no space left"), writer.block("m") as block:
            block.add_tensor("w", torch.zeros(1 << 20))
        writer.discard()
    assert not list(small_disk.iterdir())


def _twice(block):
    block.add_tensor("w", torch.zeros(1))
    block.add_tensor("w", torch.zeros(1))


def _unstorable(block):
    block.add_tensor("w", torch.zeros(1, dtype=torch.complex128))


def _incomplete(block):
    block.experts(LAYOUT).add_batch(encode_experts("up", [0], [matrix(0)]))
    block.finish_experts("m.experts")


def _repeated(block):
    block.experts(LAYOUT).add_batch(encode_experts("up", [0, 0], [matrix(0), matrix(1)]))


def _wrong_shape(block):
    codes = torch.zeros(16, 8, dtype=torch.int8)
    scales = torch.zeros(16, dtype=torch.int16)
    wrong = QuantizedMatrix(codes, scales, scales[:8])
    block.experts(LAYOUT).add_batch(encode_experts("up", [0], [wrong]))


def _open(block):
    block.experts(LAYOUT)


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (_twice, "w is written twice"),
        (_unstorable, "cannot be stored"),
        (_incomplete, "expert 1 up is missing"),
        (_repeated, "expert 0 up is written twice"),
        (_wrong_shape, r"\(16, 8\), expected \(8, 16\)"),
        (_open, "are not finished"),
    ],
)
def test_blocks_are_checked(tmp_path, fill, message):
    def write():
        with writer.block("m") as block:
            fill(block)

    with ContainerWriter(tmp_path / "a") as writer:
        with pytest.raises(ValueError, match=message):
            write()
        assert writer.finished_blocks() == {}


def test_a_tensor_in_two_blocks(tmp_path):
    with ContainerWriter(tmp_path / "a") as writer:
        for name in "xy":
            with writer.block(name) as block:
                block.add_tensor("w", torch.zeros(1))
        with pytest.raises(ValueError, match="are in another block, too"):
            writer.finish(["x", "y"], **FINISH)


def test_carried_files(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "model.safetensors", "x.py"):
        (source / name).write_text(name)
    with ContainerWriter(tmp_path / "a") as writer:
        fill(writer, "m")
        writer.finish(["m"], **FINISH, files=carried_files(source))
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "LICENSE"} <= names
    assert not {"model.safetensors", "x.py"} & names
