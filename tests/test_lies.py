"""Well-formed lies: headers, manifests and configurations, changed value by value and sealed again
with the right checksums. Whoever reads them says in one line what is wrong, or they were harmless;
nothing dies on the way, and what `verify` calls sound can be inspected."""

import copy
import hashlib
import json
import random
import shutil
import struct

import pytest
import torch
from container_parts import make, reseal
from safetensors.torch import save_file

from qmoe.errors import CorruptError, QmoeError, SourceError
from qmoe.models.streamed import StreamedModel
from qmoe.publish.verify import verify
from qmoe.source.checkpoint import open_checkpoint
from qmoe.store.inspect import inspect
from qmoe.store.manifest import MANIFEST, read_sealed, write_sealed
from qmoe.store.reader import Container
from qmoe.store.writer import INDEX
from qmoe.system.files import canonical_json
from qmoe.system.tensors import MAX_HEADER, read_header

VALUES = (
    *(None, True, 0, -1, 1 << 40, 1 << 70, 1.9, 1e300, "", "1", "\ud800", "x" * 70),
    *([], {}, [0], [[]], ["a", "b"], {"a": 1}),
)
NUMBER_OF_MANY_DIGITS = b'{"a": ' + b"9" * 5000 + b"}"


def places(value, path=()):
    """The path of every value inside; of the entries of a map or list only the first two."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in sorted(value)[: 12 if len(path) < 2 else 4]:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(min(2, len(value))):
            yield from places(value[i], (*path, i))


def lies(value, values=VALUES):
    """(what was done, the changed copy): every value replaced by others, left out, or joined by a
    stranger."""
    for path in places(value):
        for new in (*values, "leave out", "a stranger"):
            changed = copy.deepcopy(value)
            inside = changed
            for key in path[:-1]:
                inside = inside[key]
            if new == "leave out":
                del inside[path[-1]]
            elif new == "a stranger":
                if not isinstance(inside, dict):
                    continue
                inside["stranger"] = copy.deepcopy(inside[path[-1]])
            else:
                inside[path[-1]] = new
            yield (path, new), changed


def heard(read, error, *arguments):
    """What `read` has to say against it; "" if nothing. Fails on anything that is no `error` and on
    more than a line."""
    said = ""
    try:
        read(*arguments)
    except error as e:
        said = str(e)
    assert "\n" not in said
    said.encode("utf-8")  # can be printed
    return said


def attack(directory, changed_files, error=QmoeError):
    """Runs all readers of a compressed directory over lies; returns how many were seen through."""
    seen = count = 0
    for what, write in changed_files:
        write()
        count += 1
        try:
            said = heard(inspect, error, directory)
            opened = heard(Container.open, error, directory)
        except Exception as e:
            raise AssertionError(f"{what}: {type(e).__name__}: {e}") from e
        assert bool(said) == bool(opened), what
        seen += bool(said)
    assert count > 100
    return seen / count


@pytest.fixture
def stored(tmp_path):
    return make(tmp_path / "out")


def test_manifests_that_lie(stored):
    manifest = read_sealed(stored / MANIFEST)

    def changed():
        for what, document in lies(manifest):

            def write(document=document):
                write_sealed(stored / MANIFEST, document)

            yield what, write

    assert attack(stored, changed()) > 0.6


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_small_files_that_lie(stored, name):
    good = json.loads((stored / name).read_text())

    def changed():
        for what, document in lies(good):

            def write(document=document):
                (stored / name).write_bytes(canonical_json(document))
                reseal(stored)

            yield what, write

    assert attack(stored, changed()) > 0.6


def _headers(path):
    raw = path.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def _with_header(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_headers_that_lie_behind_right_checksums(stored):
    path = next(stored.glob("qmoe-m*.safetensors"))
    header, data = _headers(path)
    del header["__metadata__"]

    def changed():
        for what, document in lies(header):

            def write(document=document):
                _with_header(path, document, data)
                reseal(stored)

            yield what, write

    assert attack(stored, changed()) > 0.95


@pytest.mark.parametrize("text", [NUMBER_OF_MANY_DIGITS, b"[" * 100_000, b"\xff", b"3", b"NaN"])
def test_documents_that_are_no_json_object(stored, text):
    sealed = (stored / MANIFEST).read_bytes()
    (stored / MANIFEST).write_bytes(text)
    assert heard(inspect, CorruptError, stored)
    (stored / MANIFEST).write_bytes(sealed)
    for name in ("config.json", INDEX):
        good = (stored / name).read_bytes()
        (stored / name).write_bytes(text)
        reseal(stored)
        assert heard(inspect, CorruptError, stored)
        (stored / name).write_bytes(good)
        reseal(stored)
    path = next(stored.glob("qmoe-m*.safetensors"))
    _with_header(path, text, b"")
    reseal(stored)
    assert heard(inspect, CorruptError, stored)


def test_a_header_of_the_safetensors_limit(tmp_path):
    """100,000,000 bytes, as in the library, not 100 MiB."""
    path = tmp_path / "x.safetensors"
    assert MAX_HEADER == 100_000_000
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", MAX_HEADER + 1))
        f.truncate(8 + MAX_HEADER + 1)  # a hole
    with pytest.raises(CorruptError, match="header of 100000001 bytes"):
        read_header(path)


@pytest.mark.parametrize(
    "lie",
    [
        lambda m: m["report"]["modules"].clear(),
        lambda m: next(iter(m["report"]["modules"].values())).update(tokens=["1"]),
        lambda m: next(iter(m["report"]["modules"].values())).update(tokens=[1]),
        lambda m: next(iter(m["report"]["modules"].values()))["projections"].popitem(),
        lambda m: next(iter(m["tensors"].values())).pop("sha256"),
        lambda m: m["source"].update(bytes="many"),
        lambda m: m["report"].update(carried_weights=-(10**12)),
        lambda m: m["blocks"].popitem(),
    ],
)
def test_verify_does_not_call_sound_what_nobody_can_read(compressed, tmp_path, lie):
    out = tmp_path / "out"
    shutil.copytree(compressed[0], out)
    manifest = read_sealed(out / MANIFEST)
    lie(manifest)
    write_sealed(out / MANIFEST, manifest)
    assert heard(verify, CorruptError, out)
    assert heard(inspect, CorruptError, out)


def test_an_unknown_kind_of_experts_is_refused(compressed, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(compressed[0], out)
    config = json.loads((out / "config.json").read_text())
    next(iter(config["quantization_config"]["modules"].values()))["kind"] = "?"
    (out / "config.json").write_bytes(canonical_json(config))
    manifest = read_sealed(out / MANIFEST)
    data = (out / "config.json").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    manifest["files"]["config.json"] = {"bytes": len(data), "sha256": digest}
    write_sealed(out / MANIFEST, manifest)
    assert "quantization_config has" in heard(verify, CorruptError, out)


# ---- sources ----


def test_source_headers_that_lie(tmp_path):
    path = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    save_file({"a": torch.ones(4, 2), "b": torch.ones(3)}, path)
    header, data = _headers(path)
    seen = count = 0
    for what, document in lies(header):
        _with_header(path, document, data)
        count += 1
        try:
            seen += bool(heard(open_checkpoint, SourceError, tmp_path))
        except Exception as e:
            raise AssertionError(f"{what}: {type(e).__name__}: {e}") from e
    assert seen / count > 0.95
    for text in (NUMBER_OF_MANY_DIGITS, b"[" * 100_000, b"\xff", b"3"):
        _with_header(path, text, b"")
        assert heard(open_checkpoint, SourceError, tmp_path)


@pytest.mark.parametrize("shape", [["4"], [4.0], [1.9], ["4", 2], [True, 8]])
def test_sizes_that_are_no_integers_are_no_sizes(tmp_path, shape):
    path = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    save_file({"a": torch.ones(4)}, path)
    header, data = _headers(path)
    header["a"]["shape"] = shape
    _with_header(path, header, data)
    assert "malformed" in heard(open_checkpoint, SourceError, tmp_path)


@pytest.mark.parametrize("text", [NUMBER_OF_MANY_DIGITS, b"[" * 100_000, b"\xff", b"3"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_of_a_source_that_is_none(tmp_path, name, text):
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    save_file({"a": torch.ones(4)}, tmp_path / "1.safetensors")
    index = {"weight_map": {"a": "1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    open_checkpoint(tmp_path)
    (tmp_path / name).write_bytes(text)
    assert heard(open_checkpoint, SourceError, tmp_path)


def test_source_configurations_that_lie(tiny, tmp_path):
    source = tiny.save("mixtral", tmp_path / "source", num_hidden_layers=1)
    good = json.loads((source / "config.json").read_text())

    def read():
        StreamedModel(open_checkpoint(str(source)))

    read()
    cases = list(lies(good, (None, -1, "x", [], {"a": 1})))
    random.Random(0).shuffle(cases)
    settings = [c for c in cases if c[0][0][0] in ("architectures", "model_type", "auto_map")]
    quantized = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 8}}
    settings += list(lies(quantized, (None, -1, "x", [], {"a": 1})))
    for what, document in settings + cases[:40]:
        (source / "config.json").write_text(json.dumps(good | document))
        try:
            heard(read, QmoeError)
        except Exception as e:
            raise AssertionError(f"{what}: {type(e).__name__}: {e}") from e
