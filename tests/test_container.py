"""Writing and validating compressed checkpoints: atomic, durable, deterministic, refused when
anything is off."""

import hashlib
import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import qmoe
from qmoe.container import INDEX, ContainerWriter
from qmoe.durable import canonical_json
from qmoe.errors import CorruptError, FormatVersionError, OutputError
from qmoe.families.base import ExpertsLayout, Projection
from qmoe.manifest import MANIFEST, read_manifest, read_sealed, write_sealed
from qmoe.reader import Container
from qmoe.stream import ExpertStream
from qmoe.tensorfile import Spill, read_header, read_tensor
from qmoe.types import QuantizedMatrix

FINISH = {"config": {"model_type": "x"}, "settings": {}, "versions": {}, "source": {}}
LAYOUT = ExpertsLayout("m.experts", "fused", 2, (Projection("up", 8, 16, False),))


def _matrix(seed):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (8, 16), generator=g, dtype=torch.int8)
    return QuantizedMatrix(
        codes, torch.zeros(8, dtype=torch.int16), torch.zeros(16, dtype=torch.int16)
    )


def _fill(writer, name, seed=0):
    with writer.block(name) as block:
        g = torch.Generator().manual_seed(seed)
        block.add_tensor(f"{name}.w", torch.randn(3, 5, generator=g).bfloat16())
        block.add_tensor(f"{name}.scalar", torch.tensor(4, dtype=torch.int64))
        block.add_tensor(f"{name}.empty", torch.zeros(0, 7))
        if name == "m":
            experts = block.experts(LAYOUT)
            for e in (1, 0):
                experts.add_group("up", [e], [_matrix(e)])
            block.finish_experts("m.experts", [5, 0], ["", "no tokens: rounded"])
        block.note = {"seed": seed}


def _interrupted(writer):
    with writer.block("rest") as block:
        block.add_tensor("rest.w", torch.zeros(3))
        raise KeyboardInterrupt


def _make(out, blocks=("m", "rest"), **options):
    with ContainerWriter(out, **options) as writer:
        for i, name in enumerate(blocks):
            _fill(writer, name, i)
        return writer.finish(list(blocks), **FINISH)


def _tree(directory):
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


def _reseal(directory, **changes):
    """Makes a changed directory consistent with its manifest again, as a malicious writer would."""
    manifest = read_sealed(directory / MANIFEST) | changes
    for name in manifest["files"]:
        data = (directory / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_sealed(directory / MANIFEST, manifest)


def test_bytes_depend_on_the_input_only(tmp_path, monkeypatch):
    a = _tree(_make(tmp_path / "a"))
    monkeypatch.setenv("LC_ALL", "tr_TR.UTF-8")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert a == _tree(_make(tmp_path / "elsewhere" / "b"))
    assert set(a) == {
        "config.json",
        INDEX,
        MANIFEST,
        "qmoe-m.safetensors",
        "qmoe-rest.safetensors",
    }
    assert not list(tmp_path.glob("*.partial"))


def test_the_safetensors_library_reads_the_same(tmp_path):
    container = Container.open(_make(tmp_path / "a"))
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
        assert torch.equal(streams.dense(e, 0), _matrix(e).dequantize())
    assert container.dense_names() == [n for n in container.tensors if "experts" not in n]


def test_report_counts_bytes_and_zeros(tmp_path):
    container = Container.open(_make(tmp_path / "a"))
    report = container.manifest["report"]["modules"]["m.experts"]
    up = report["projections"]["up"]
    assert report["tokens"] == [5, 0]
    assert up["bytes"] == container.tensors["m.experts.stream"][2].shape[0]
    assert up["zeros"] == sum(int((_matrix(e).codes == 0).sum()) for e in range(2))
    assert up["weights"] == 2 * 8 * 16


@pytest.mark.parametrize("limit", [1, 40, 200, 10_000])
def test_shards_are_bounded(tmp_path, limit):
    container = Container.open(_make(tmp_path / "a", max_shard_bytes=limit))
    for path in container.directory.glob("*.safetensors"):
        start, entries = read_header(path)
        size = path.stat().st_size - start
        assert size <= limit or sum(e.end > e.begin for e in entries.values()) == 1
    assert torch.equal(container.experts("m.experts").dense(1, 0), _matrix(1).dequantize())


def test_resume_keeps_finished_blocks_and_gives_the_same_bytes(tmp_path):
    whole = _tree(_make(tmp_path / "a"))
    out = tmp_path / "b"
    with ContainerWriter(out, job={"seed": 1}) as writer:
        _fill(writer, "m", 0)
        with pytest.raises(KeyboardInterrupt):
            _interrupted(writer)
    assert not out.exists()
    before = (tmp_path / "b.partial/data/qmoe-m.safetensors").stat().st_mtime_ns
    with ContainerWriter(out, job={"seed": 1}, resume=True) as writer:
        assert writer.finished_blocks() == {"m": {"seed": 0}}
        with pytest.raises(ValueError, match="are not finished"):
            writer.finish(["m", "rest"], **FINISH)
        _fill(writer, "rest", 1)
        writer.finish(["m", "rest"], **FINISH)
    assert _tree(out) == whole
    assert (out / "qmoe-m.safetensors").stat().st_mtime_ns == before


class Crash(BaseException):
    """Power loss: nothing after it runs, no handler knows it."""


def test_a_crash_at_every_step_is_resumed(tmp_path, monkeypatch):
    """Dies at the k-th rename, sync or removal, for every k; OUT is complete or absent, the end is
    the same."""
    whole = _tree(_make(tmp_path / "whole"))
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
            _make(out)
            break  # lived to the end
        except Crash:
            crashes += 1
        left = None
        if out.exists():
            assert _tree(out) == whole
            continue
        with ContainerWriter(out, resume=True) as writer:
            for i, name in enumerate(("m", "rest")):
                if name not in writer.finished_blocks():
                    _fill(writer, name, i)
            writer.finish(["m", "rest"], **FINISH)
        assert _tree(out) == whole
    assert 10 < crashes < 200


def test_resume_after_damage_writes_the_block_again(tmp_path):
    out = tmp_path / "a"
    with ContainerWriter(out) as writer:
        _fill(writer, "m")
        _fill(writer, "rest")
    shard = tmp_path / "a.partial/data/qmoe-m.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x99")
    with ContainerWriter(out, resume=True) as writer:
        assert set(writer.finished_blocks()) == {"rest"}
    (tmp_path / "a.partial/journal/rest.json").write_bytes(b"{")
    with ContainerWriter(out, resume=True) as writer:
        assert writer.finished_blocks() == {}


def test_starting_over_forgets(tmp_path):
    with ContainerWriter(tmp_path / "a") as writer:
        _fill(writer, "m")
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
    assert Container.open(_make(tmp_path / "empty"))


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
from qmoe.container import ContainerWriter
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
        _fill(writer, "m", 0)
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
        _fill(writer, "rest", 1)
        writer.finish(["m", "rest"], **FINISH)
    assert _tree(out) == _tree(_make(tmp_path / "b"))


@pytest.fixture
def small_disk(tmp_path):
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(where)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs")
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
    block.add_tensor("w", torch.zeros(1, dtype=torch.complex64))


def _incomplete(block):
    block.experts(LAYOUT).add_group("up", [0], [_matrix(0)])
    block.finish_experts("m.experts")


def _repeated(block):
    block.experts(LAYOUT).add_group("up", [0, 0], [_matrix(0), _matrix(1)])


def _wrong_shape(block):
    codes = torch.zeros(16, 8, dtype=torch.int8)
    scales = torch.zeros(16, dtype=torch.int16)
    block.experts(LAYOUT).add_group("up", [0], [QuantizedMatrix(codes, scales, scales[:8])])


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
        _fill(writer, "m")
        writer.finish(["m"], **FINISH, carry_from=source)
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "LICENSE"} <= names
    assert not {"model.safetensors", "x.py"} & names


# ---- readers ----


def test_manifest_notices_a_bit_in_every_byte(tmp_path):
    _make(tmp_path / "a")
    path = tmp_path / "a" / MANIFEST
    good = path.read_bytes()
    for at in range(len(good)):
        data = bytearray(good)
        data[at] ^= 1 << at * 5 % 8
        path.write_bytes(data)
        with pytest.raises((CorruptError, FormatVersionError)):
            read_manifest(tmp_path / "a")


def test_missing_listed_stray_and_truncated_files(tmp_path):
    for name in ("config.json", INDEX, MANIFEST, "qmoe-m.safetensors"):
        out = _make(tmp_path / name.replace(".", "_"))
        (out / name).unlink()
        with pytest.raises(CorruptError, match=name):
            Container.open(out)
    out = _make(tmp_path / "stray")
    (out / "qmoe-z.safetensors").write_bytes(b"")
    with pytest.raises(CorruptError, match="is not listed"):
        Container.open(out)
    out = _make(tmp_path / "short")
    path = out / "qmoe-m.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptError, match=f"has {size - 1} bytes, expected {size}"):
        Container.open(out)
    with pytest.raises(CorruptError, match="not a complete compressed checkpoint"):
        Container.open(tmp_path)


def test_unknown_version(tmp_path):
    out = _make(tmp_path / "a")
    _reseal(out, format_version=2)
    with pytest.raises(FormatVersionError, match="format version 2, this release reads version 1"):
        Container.open(out)
    out = _make(tmp_path / "b")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["format_version"] = "1"
    (out / "config.json").write_bytes(canonical_json(config))
    _reseal(out)
    with pytest.raises(FormatVersionError, match="format version '1'"):
        Container.open(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(quant_method="gptq"), "is not qmoe"),
        (lambda q: q.update(modules={}), "no experts module"),
        (lambda q: q["modules"].update({"n.experts": q["modules"]["m.experts"]}), "no stored"),
        (lambda q: q["modules"]["m.experts"].update(kind="?"), "geometry"),
        (lambda q: q["modules"]["m.experts"].update(experts=3), "asks for"),
        (lambda q: q["modules"]["m.experts"].update(experts=True), "geometry"),
        (lambda q: q["modules"]["m.experts"].update(experts=-2), "geometry"),
        (lambda q: q["modules"]["m.experts"].update(projections=[]), "geometry"),
        (lambda q: q["modules"]["m.experts"].update(projections=[["up", 8]]), "geometry"),
        (
            lambda q: q["modules"]["m.experts"].update(projections=[["up", 1 << 30, 1 << 30]]),
            "geometry",
        ),
        (lambda q: q["modules"].update({"m.experts": 7}), "geometry"),
    ],
)
def test_config_that_disagrees(tmp_path, change, message):
    out = _make(tmp_path / "a")
    config = json.loads((out / "config.json").read_text())
    change(config["quantization_config"])
    (out / "config.json").write_bytes(canonical_json(config))
    _reseal(out)
    with pytest.raises(CorruptError, match=message):
        Container.open(out)


def test_matrix_of_another_shape(tmp_path):
    out = _make(tmp_path / "a")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["modules"]["m.experts"]["projections"] = [["up", 16, 8]]
    (out / "config.json").write_bytes(canonical_json(config))
    _reseal(out)
    with pytest.raises(CorruptError, match=r"expert 0 up is 8 x 16, config\.json says 16 x 8"):
        Container.open(out).experts("m.experts").dense(0, 0)


def test_index_that_disagrees(tmp_path):
    out = _make(tmp_path / "a")
    index = json.loads((out / INDEX).read_text())
    index["weight_map"]["m.w"] = "qmoe-rest.safetensors"
    (out / INDEX).write_bytes(canonical_json(index))
    _reseal(out)
    with pytest.raises(CorruptError, match=r"disagrees with the files about \['m\.w'\]"):
        Container.open(out)


@pytest.mark.parametrize(
    "offsets",
    [
        [[0, 4, 4, 8]],  # as many experts as the geometry says
        [[[0, 4, 4, 8]], [[0, 4, 4, 104]]],  # beyond the end
        [[[0, 4, 4, 8]], [[0, 4, 8, 8]]],  # empty
        [[[0, 4, 4, 8]], [[-4, 4, 4, 8]]],
        [[[0, 4, 4, 8]], [[0, 4, 5, 9]]],  # not on a word
        [[[0, 4, 4, 8]], [[1 << 62, -(1 << 62), 4, 8]]],
    ],
)
def test_offsets_are_validated(offsets):
    stream = torch.zeros(100, dtype=torch.uint8)
    with pytest.raises(CorruptError, match=r"m\.experts"):
        ExpertStream(LAYOUT, stream, torch.tensor(offsets))


def _header(tmp_path, header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        ({"a": GOOD}, b"\0" * 7, None),
        ({"a": GOOD}, b"\0" * 9, None),
        ({"a": GOOD}, b"\0" * 8, 1 << 60),
        ({"a": GOOD}, b"\0" * 8, 3),
        (b"[]", b"", None),
        (b"\xff\xfe", b"", None),
        (b"[" * 100_000, b"", None),
        ({"a": 3}, b"\0" * 8, None),
        ({"a": GOOD | {"dtype": "F31"}}, b"\0" * 8, None),
        ({"a": GOOD | {"shape": [-2]}}, b"\0" * 8, None),
        ({"a": GOOD | {"shape": [True, 2]}}, b"\0" * 8, None),
        ({"a": GOOD | {"shape": "2"}}, b"\0" * 8, None),
        ({"a": GOOD | {"shape": [1 << 62, 1 << 62]}}, b"\0" * 8, None),
        ({"a": GOOD | {"data_offsets": [0, 8, 16]}}, b"\0" * 8, None),
        ({"a": GOOD | {"data_offsets": [4, 12]}}, b"\0" * 12, None),
        ({"a": GOOD | {"data_offsets": ["0", "8"]}}, b"\0" * 8, None),
        ({"a": GOOD, "b": GOOD}, b"\0" * 8, None),
    ],
)
def test_headers_that_lie(tmp_path, header, data, length):
    with pytest.raises(CorruptError, match=r"x\.safetensors"):
        read_header(_header(tmp_path, header, data, length))


def test_header_that_does_not(tmp_path):
    start, entries = read_header(_header(tmp_path, {"a": GOOD}))
    path = tmp_path / "x.safetensors"
    assert torch.equal(read_tensor(path, start, entries["a"]), torch.zeros(2))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CorruptError, match="truncated"):
        read_tensor(path, start, entries["a"])


def test_spill_appends_and_interleaves(tmp_path):
    spill = Spill(tmp_path / "s")
    assert spill.append("a", torch.tensor([1, 2], dtype=torch.uint8)) == 0
    spill.add("b", torch.tensor([1.5], dtype=torch.float64))
    assert spill.append("a", torch.tensor([3], dtype=torch.uint8)) == 2
    with pytest.raises(ValueError, match="pieces are uint8"):
        spill.append("a", torch.tensor([3]))
    (names,) = spill.shards(100)
    spill.write_shard(tmp_path / "out.safetensors", names)
    spill.close()
    loaded = load_file(tmp_path / "out.safetensors")
    assert loaded["a"].tolist() == [1, 2, 3]
    assert loaded["b"].tolist() == [1.5]
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 5},
        {"num_hidden_layers": 1},
        {"hidden_size": 32},
        {"num_local_experts": 5},
        {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]},
        {"tie_word_embeddings": True, "vocab_size": 64},
    ],
)
def test_model_that_disagrees_with_its_tensors(compressed, tmp_path, change):
    import shutil

    from qmoe.verify import verify

    out = tmp_path / "c"
    shutil.copytree(compressed[0], out)
    config = json.loads((out / "config.json").read_text()) | change
    (out / "config.json").write_bytes(canonical_json(config))
    _reseal(out)
    with pytest.raises(CorruptError):
        qmoe.load(out)
    with pytest.raises(CorruptError):
        verify(out)
