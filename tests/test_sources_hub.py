"""Hub sources against a local stand-in of the hub's HTTP interface (tests/hub.py)."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "owner/model"


@pytest.fixture
def hub(tmp_path, serve_hub):
    torch.manual_seed(0)
    files = {"config.json": b'{"model_type": "toy"}', "tokenizer.json": b"{}"}
    where = {}
    for i in range(2):
        tensors = {f"t{i}.{k}": torch.randn(300, 1000) for k in "ab"}
        save_file(tensors, tmp_path / "x")
        name = f"model-{i}.safetensors"
        files[name] = (tmp_path / "x").read_bytes()
        where.update(dict.fromkeys(tensors, name))
    files["model.safetensors.index.json"] = json.dumps({"weight_map": where}).encode()
    return serve_hub(files)


def run(hub, home, script, offline=False, ok=True):
    env = hub.environment(home, offline)
    head = "import json\nfrom qmoe.source.checkpoint import open_checkpoint\n"
    cmd = [sys.executable, "-c", head + script]
    r = subprocess.run(cmd, env=env, capture_output=True, text=True)
    if not ok:
        assert r.returncode != 0
        return r.stderr.strip().splitlines()[-1]
    assert r.returncode == 0, r.stderr[-3000:]
    return json.loads(r.stdout.splitlines()[-1])


SHAPES = f"""
ck = open_checkpoint("{REPO}")
print(json.dumps([{{n: ck.shape(n) for n in ck.names()}}, ck.source_bytes, ck.fingerprint()]))
"""
READ = f"""
ck = open_checkpoint("{REPO}")
print(json.dumps([float(ck.read("t1.b").double().sum()), ck.directory.name]))
"""


def got(hub, name):
    return sum(n for _, file, n in hub.log if file == name)


def test_headers_first_shards_when_read_then_offline(hub, tmp_path):
    shapes, size, _ = run(hub, tmp_path / "home", SHAPES)
    assert shapes == {f"t{i}.{k}": [300, 1000] for i in range(2) for k in "ab"}
    weights = {f: b for f, b in hub.files.items() if f.startswith("model-")}
    assert size == sum(map(len, weights.values()))
    assert all(got(hub, f) < len(b) / 10 for f, b in weights.items())

    value, commit = run(hub, tmp_path / "home", READ)
    assert got(hub, "model-1.safetensors") >= len(weights["model-1.safetensors"])
    assert got(hub, "model-0.safetensors") < len(weights["model-0.safetensors"]) / 5
    assert commit == COMMIT

    hub.log.clear()
    assert run(hub, tmp_path / "home", READ, offline=True) == [value, commit]
    assert not hub.log
    script = READ.replace("t1.b", "t0.b")
    message = run(hub, tmp_path / "home", script, offline=True, ok=False)
    assert message.startswith("qmoe.errors.SourceError")
    assert "model-0.safetensors" in message


def test_finished_shards_are_deleted_from_the_cache_directory(hub, tmp_path):
    cache = tmp_path / "cache"
    script = f"""
from pathlib import Path
cache = Path({str(cache)!r})
held = lambda: sorted(p.name for p in (cache / "{COMMIT}").glob("*.safetensors"))
ck = open_checkpoint("{REPO}", cache=cache)
ck.expect(ck.names())
seen = [held()]
for n in ck.names():
    ck.read(n)
    seen.append(held())
    ck.finished([n])
    seen.append(held())
print(json.dumps(seen))
"""
    a, b = [f"model-{i}.safetensors" for i in range(2)]
    assert run(hub, tmp_path / "home", script) == [[], [a], [a], [a], [], [b], [b], [b], []]


def test_prefetch_downloads_in_the_background(hub, tmp_path):
    script = f"""
ck = open_checkpoint("{REPO}")
ck.prefetch(["t0.a", "t0.b"])
repository = ck._stored.where["t0.a"]._repository
repository._coming["model-0.safetensors"].join()
assert repository.cached("model-0.safetensors") is not None
print(json.dumps(float(ck.read("t0.a")[0, 0])))
"""
    run(hub, tmp_path / "home", script)
    full = [f for method, f, n in hub.log if n > 2_000_000]
    assert full == ["model-0.safetensors"]


def test_no_such_repository(hub, tmp_path):
    message = run(hub, tmp_path / "home", 'open_checkpoint("owner/other")', ok=False)
    assert message.startswith("qmoe.errors.SourceError: 'owner/other' is neither a local directory")


def test_index_that_disagrees_with_a_remote_header(hub, tmp_path):
    index = json.loads(hub.files["model.safetensors.index.json"])
    index["weight_map"]["ghost"] = "model-0.safetensors"
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    script = f'open_checkpoint("{REPO}").shape("t0.a")'
    assert "'ghost' is in owner/model/model-0" in run(hub, tmp_path / "home", script, ok=False)
