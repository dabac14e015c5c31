"""Reading compressed checkpoints: whatever does not fit together is refused, and says what."""

import json

import pytest
import torch
from container_parts import LAYOUT, make, reseal
from safetensors.torch import load_file

import qmoe
from qmoe.errors import CorruptError, FormatVersionError
from qmoe.store.manifest import MANIFEST, read_manifest
from qmoe.store.reader import Container
from qmoe.store.stored_experts import StoredExperts
from qmoe.store.writer import INDEX
from qmoe.system.files import canonical_json
from qmoe.system.spill import Spill
from qmoe.system.tensors import DTYPES, read_header, read_tensor


def test_manifest_notices_a_bit_in_every_byte(tmp_path):
    make(tmp_path / "a")
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
        out = make(tmp_path / name.replace(".", "_"))
        (out / name).unlink()
        with pytest.raises(CorruptError, match=name):
            Container.open(out)
    out = make(tmp_path / "stray")
    (out / "qmoe-z.safetensors").write_bytes(b"")
    with pytest.raises(CorruptError, match="is not listed"):
        Container.open(out)
    out = make(tmp_path / "short")
    path = out / "qmoe-m.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptError, match=f"has {size - 1} bytes, expected {size}"):
        Container.open(out)
    with pytest.raises(CorruptError, match="not a complete compressed checkpoint"):
        Container.open(tmp_path)


def test_unknown_version(tmp_path):
    out = make(tmp_path / "a")
    reseal(out, format_version=2)
    with pytest.raises(FormatVersionError, match="format version 2, this release reads version 1"):
        Container.open(out)
    out = make(tmp_path / "b")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["format_version"] = "1"
    (out / "config.json").write_bytes(canonical_json(config))
    reseal(out)
    with pytest.raises(FormatVersionError, match="format version '1'"):
        Container.open(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(quant_method="gptq"), "is not qmoe"),
        (lambda q: q.update(modules={}), "no experts module"),
        (lambda q: q["modules"].update({"n.experts": q["modules"]["m.experts"]}), "no stored"),
        (lambda q: q["modules"]["m.experts"].update(kind=7), "geometry"),
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
    out = make(tmp_path / "a")
    config = json.loads((out / "config.json").read_text())
    change(config["quantization_config"])
    (out / "config.json").write_bytes(canonical_json(config))
    reseal(out)
    with pytest.raises(CorruptError, match=message):
        Container.open(out)


def test_matrix_of_another_shape(tmp_path):
    out = make(tmp_path / "a")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["modules"]["m.experts"]["projections"] = [["up", 16, 8]]
    (out / "config.json").write_bytes(canonical_json(config))
    reseal(out)
    with pytest.raises(CorruptError, match=r"expert 0 up is 8 x 16, config\.json says 16 x 8"):
        Container.open(out).experts("m.experts").dense(0, 0)


def test_index_that_disagrees(tmp_path):
    out = make(tmp_path / "a")
    index = json.loads((out / INDEX).read_text())
    index["weight_map"]["m.w"] = "qmoe-rest.safetensors"
    (out / INDEX).write_bytes(canonical_json(index))
    reseal(out)
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
        StoredExperts(LAYOUT, stream, torch.tensor(offsets))


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


def test_every_dtype_of_a_source_can_be_stored(tmp_path):
    spill = Spill(tmp_path / "s")
    data = torch.arange(2 * 16, dtype=torch.uint8) % 2  # valid in every dtype, bool included
    for name, dtype in DTYPES.items():
        spill.add(name, data.view(dtype))
    (names,) = spill.shards(1 << 20)
    path = tmp_path / "out.safetensors"
    spill.write_shard(path, names)
    spill.close()
    start, entries = read_header(path)
    theirs = load_file(path)
    for name, dtype in DTYPES.items():
        for loaded in (theirs[name], read_tensor(path, start, entries[name])):
            assert loaded.dtype == dtype
            assert torch.equal(loaded.view(torch.uint8), data)


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

    from qmoe.publish.verify import verify

    out = tmp_path / "c"
    shutil.copytree(compressed[0], out)
    config = json.loads((out / "config.json").read_text()) | change
    (out / "config.json").write_bytes(canonical_json(config))
    reseal(out)
    with pytest.raises(CorruptError):
        qmoe.load(out)
    with pytest.raises(CorruptError):
        verify(out)
