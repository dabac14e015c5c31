"""Source checkpoints: lazy reading, and every way in which files can lie."""

import json
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmoe.errors import SourceError
from qmoe.source.checkpoint import open_checkpoint

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "tiny-mixtral"


def write(directory: Path, shards: dict, index: dict | None = None, **config) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "toy", **config}))
    for name, tensors in shards.items():
        if name.endswith(".bin"):
            torch.save(tensors, directory / name)
        else:
            save_file(tensors, directory / name, {"format": "pt"})
    if len(shards) > 1 or index is not None:
        kind = "pytorch_model.bin" if next(iter(shards)).endswith(".bin") else "model.safetensors"
        weights = {k: f for f, tensors in shards.items() for k in tensors}
        (directory / f"{kind}.index.json").write_text(json.dumps({"weight_map": index or weights}))
    return directory


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "e": torch.randn(5, 3, 4),
        "h": torch.randn(7, 2).bfloat16(),
        "i": torch.arange(6),
        "s": torch.tensor(2.5),
        "z": torch.zeros(0, 3),
    }


def test_reads_the_example_like_safetensors():
    ck = open_checkpoint(EXAMPLE)
    ref = load_file(EXAMPLE / "model.safetensors")
    assert ck.names() == sorted(ref)
    assert ck.source_bytes == (EXAMPLE / "model.safetensors").stat().st_size
    for name, value in ref.items():
        assert ck.shape(name) == tuple(value.shape)
        assert ck.dtype(name) == value.dtype
        assert torch.equal(ck.read(name), value)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("sharded", [False, True])
def test_selections(tmp_path, tensors, ending, sharded):
    stem = "model" if ending == "safetensors" else "pytorch_model"
    if sharded:
        parts = {f"{stem}-{i}.{ending}": {k: v} for i, (k, v) in enumerate(tensors.items())}
    else:
        parts = {f"{stem}.{ending}": tensors}
    ck = open_checkpoint(write(tmp_path, parts))
    assert ck.names() == sorted(tensors)
    for name, value in tensors.items():
        assert torch.equal(ck.read(name), value)
        assert torch.equal(ck.lazy(name)[...], value)
        assert ck.lazy(name).get_shape() == list(value.shape)
    assert ck.lazy("h").get_dtype() == "BF16"
    e = tensors["e"]
    picks = (2, -1, slice(1, 2), slice(-2, None), slice(0, 5, 2), slice(3, 3), ...)
    for pick in (*picks, (1, 2), (slice(1, 3), slice(None), 1), (..., slice(1, 3)), (2, ..., 0)):
        got = ck.read("e", pick)
        assert torch.equal(got, e[pick]), pick
        assert got.untyped_storage().nbytes() <= max(got.numel(), 12) * 4
    with pytest.raises(IndexError, match="5"):
        ck.read("e", 5)
    assert torch.equal(ck.lazy("e", slice(2, 3))[...], e[2:3])


def test_reads_only_the_bytes_asked_for(tmp_path, monkeypatch):
    import qmoe.source.shards as shard

    ck = open_checkpoint(write(tmp_path, {"model.safetensors": {"e": torch.randn(64, 16, 16)}}))
    read = []
    real = shard.os.preadv
    monkeypatch.setattr(shard.os, "preadv", lambda *a: read.append(real(*a)) or read[-1])
    ck.read("e", slice(3, 4))
    assert sum(read) == 16 * 16 * 4


def test_fingerprint(tmp_path, tensors):
    def at(name):
        return open_checkpoint(tmp_path / name).fingerprint()

    write(tmp_path / "a", {"model.safetensors": tensors})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    write(tmp_path / "c", {"model.safetensors": {**tensors, "s": torch.tensor(3.5)}})
    write(tmp_path / "d", {"model.safetensors": tensors}, hidden_size=4)
    assert at("a") == at("b")
    assert len({at("a"), at("c"), at("d")}) == 3


def rewrite_header(path: Path, change) -> None:
    raw = path.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + n])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + n :])


def truncate(d):
    raw = (d / "model-1.safetensors").read_bytes()
    (d / "model-1.safetensors").write_bytes(raw[:-5])


def longer(d):
    with (d / "model-1.safetensors").open("ab") as f:
        f.write(b"junk")


def overlap(d):
    def change(h):
        h["b"]["data_offsets"] = [8, 24]

    rewrite_header(d / "model-1.safetensors", change)


def wrong_shape(d):
    rewrite_header(d / "model-1.safetensors", lambda h: h["a"].update(shape=[5]))


def negative(d):
    rewrite_header(d / "model-1.safetensors", lambda h: h["a"].update(shape=[-2, -2]))


def no_offsets(d):
    rewrite_header(d / "model-1.safetensors", lambda h: h["a"].pop("data_offsets"))


def strange_dtype(d):
    rewrite_header(d / "model-1.safetensors", lambda h: h["a"].update(dtype="F4"))


def huge_header(d):
    raw = (d / "model-1.safetensors").read_bytes()
    (d / "model-1.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + raw[8:])


def missing(d):
    (d / "model-2.safetensors").unlink()


def lfs_pointer(d):
    (d / "model-2.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0"
    )


def edit_index(d, change):
    path = d / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def absent(d):
    edit_index(d, lambda w: w.update(ghost="model-2.safetensors"))


def unnamed(d):
    edit_index(d, lambda w: w.pop("b"))


def duplicate(d):
    save_file({"a": torch.ones(4), "c": torch.ones(4)}, d / "model-2.safetensors")


def no_index(d):
    (d / "model.safetensors.index.json").unlink()


def broken_config(d):
    (d / "config.json").write_text("{")


def no_config(d):
    (d / "config.json").unlink()


def no_weights(d):
    for f in d.glob("model*"):
        f.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "model-1.safetensors.*truncated"),
        (longer, "model-1.safetensors.*truncated or damaged"),
        (overlap, "overlaps"),
        (wrong_shape, "'a'.*needs 20 bytes.*0..16"),
        (negative, "'a'.*-2"),
        (no_offsets, "'a' is malformed"),
        (strange_dtype, "'a' has dtype 'F4'"),
        (huge_header, "no complete safetensors file"),
        (missing, "model-2.safetensors, which is missing"),
        (lfs_pointer, "git-lfs"),
        (no_index, "2 safetensors files.*no model.safetensors.index.json"),
        (broken_config, "config.json cannot be read as JSON"),
        (no_config, "no config.json"),
        (no_weights, "no weights"),
    ],
)
def test_lying_files(tmp_path, damage, words):
    shards = {
        "model-1.safetensors": {"a": torch.ones(4), "b": torch.ones(4)},
        "model-2.safetensors": {"c": torch.ones(4)},
    }
    d = write(tmp_path / "src", shards)
    open_checkpoint(d)
    damage(d)
    with pytest.raises(SourceError, match=words) as e:
        open_checkpoint(d)
    assert "\n" not in str(e.value)


def test_shard_replaced_while_reading(tmp_path):
    d = write(tmp_path / "src", {"model.safetensors": {"a": torch.ones(4)}})
    ck = open_checkpoint(d)
    write(d, {"model.safetensors": {"a": torch.zeros(8)}})
    with pytest.raises(SourceError, match="changed while it was being read"):
        ck.read("a")


def test_read_error_names_file_and_byte(tmp_path, monkeypatch):
    import qmoe.source.shards as shard

    ck = open_checkpoint(write(tmp_path, {"model.safetensors": {"a": torch.ones(4)}}))

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shard.os, "preadv", broken)
    with pytest.raises(SourceError, match=r"model.safetensors at byte \d+: Input/output error"):
        ck.read("a")


def test_prefetch_and_threads(tmp_path, tensors):
    parts = {f"pytorch_model-{i}.bin": {f"{k}{i}": v for k, v in tensors.items()} for i in range(9)}
    bins = open_checkpoint(write(tmp_path / "bin", parts))
    one = open_checkpoint(write(tmp_path / "one", {"model.safetensors": tensors}))
    one.prefetch(one.names())
    bins.prefetch(bins.names())
    with ThreadPoolExecutor(8) as pool:
        for ck in (one, bins):
            names = ck.names() * 20
            for name, value in zip(names, pool.map(ck.read, names), strict=True):
                assert torch.equal(value, tensors[name.rstrip("0123456789")])


def test_unknown_tensor_names_it(tmp_path):
    ck = open_checkpoint(write(tmp_path, {"model.safetensors": {"a": torch.ones(4)}}))
    with pytest.raises(SourceError, match="'nope' is not in the checkpoint"):
        ck.read("nope")


def test_truncated_bin(tmp_path):
    d = write(tmp_path, {"pytorch_model.bin": {"a": torch.ones(4000)}})
    raw = (d / "pytorch_model.bin").read_bytes()
    (d / "pytorch_model.bin").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(SourceError, match="cannot be read as torch weights"):
        open_checkpoint(d)


def test_bin_with_code_is_refused(tmp_path):
    d = write(tmp_path, {"pytorch_model.bin": {"a": torch.ones(4)}})
    torch.save({"a": Path("x")}, d / "pytorch_model.bin")
    with pytest.raises(SourceError, match="unsafe"):
        open_checkpoint(d)


def test_bin_in_the_format_before_zip(tmp_path, tensors):
    d = write(tmp_path, {"pytorch_model.bin": tensors})
    torch.save(tensors, d / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    ck = open_checkpoint(d)
    assert torch.equal(ck.read("e", 2), tensors["e"][2])


@pytest.mark.parametrize(
    "source", ["/no/such/place", "./nope", "a/b/c", "not a repo", "x/y z", "~nobody/x"]
)
def test_no_such_source(source, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceError) as e:
        open_checkpoint(source)
    assert source in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes'"),
        ({"quant_method": "qmoe"}, "already compressed"),
        ({"quant_method": "gptq", "bits": 3}, "bits=3"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "'marlin-24'"),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, "block size"),
        ({}, None),
    ],
)
def test_quantization_method(tmp_path, settings, words):
    d = write(tmp_path, {"model.safetensors": {"a": torch.ones(4)}}, quantization_config=settings)
    if words is None:
        assert open_checkpoint(d).quantization is None
        return
    with pytest.raises(SourceError, match=words):
        open_checkpoint(d)


def test_source_is_never_written(tmp_path, tensors):
    d = write(tmp_path / "src", {"model.safetensors": tensors})
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in d.iterdir()}
    d.chmod(0o555)
    for name in (ck := open_checkpoint(d)).names():
        ck.read(name)
    ck.finished(ck.names())
    d.chmod(0o755)
    assert before == {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in d.iterdir()}
