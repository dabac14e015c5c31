"""``--source-cache drop``: shards come when they are read and go when no block needs them."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from hub import commit_of
from safetensors.torch import load_file, save_file

from qmoe.cli import main
from qmoe.compression.pipeline import compress
from qmoe.compression.settings import Settings
from qmoe.errors import InterruptedRunError, SourceError
from qmoe.measure.score import evaluate

REPO = "owner/model"
BLOCKS, SHARDS = 6, 9
PEAK = 4  # shards on the disk at any moment: those of a block, and of the next that is read ahead


def _order(name):
    """The order of publishers: embeddings, block after block, norm and head."""
    parts = name.split(".")
    number = next((int(p) for p in parts if p.isdecimal()), None)
    return (0 if "embed" in name else 2 if number is None else 1, number or 0, name)


@pytest.fixture(scope="module")
def job(tiny, tmp_path_factory):
    """A Mixtral cut into shards without regard to blocks, a tensor that no module takes in each."""
    folder = tmp_path_factory.mktemp("job")
    source = tiny.save("mixtral", folder / "source", num_hidden_layers=BLOCKS, hidden_size=32)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    total = sum(t.nbytes for t in tensors.values())
    parts, done = [{} for _ in range(SHARDS)], 0
    for name in sorted(tensors, key=_order):
        parts[min(SHARDS - 1, SHARDS * done // total)][name] = tensors[name]
        done += tensors[name].nbytes
    where = {}
    for i, part in enumerate(parts):
        part[f"extra.{i}.table"] = torch.full((4,), float(i))
        save_file(part, source / f"model-{i}.safetensors", {"format": "pt"})
        where.update(dict.fromkeys(part, f"model-{i}.safetensors"))
    (source / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    tiny.save_tokenizer(source)
    text = tiny.save_text(folder / "text.txt", 1500)
    # the model's own words read the source once more
    return source, Settings("rd", str(text), calib_tokens=1024, ctx=128, unseen=0.0)


@pytest.fixture
def hub(job, serve_hub, monkeypatch, tmp_path):
    """The job's source on a hub that this process uses; `peak` counts shards on the disk."""
    served = serve_hub({p.name: p.read_bytes() for p in job[0].iterdir()})
    served.attach(monkeypatch, tmp_path / "home")
    served.peak = 0

    def count(file):
        here = tmp_path.rglob("model-*.safetensors")
        served.peak = max(served.peak, len({p.name for p in here if p.is_file()} | {file}))

    served.before = count
    return served


def _run(job, out, **changes):
    heard = []
    settings = Settings(**(vars(job[1]) | changes))
    compress(REPO, out, settings, say=heard.append)
    return heard


def _bytes(out):
    return {p.name: p.read_bytes() for p in out.iterdir()}


def _shards(hub):
    """Shards that were downloaded, with repetitions."""
    sizes = {f: len(b) for f, b in hub.files.items()}
    return [f for _, f, n in hub.log if f.startswith("model-") and n == sizes[f]]


@pytest.mark.parametrize("aim", [{"bits": 2.0}, {"delta": 8.0, "dense_bits": 8}])
def test_same_bytes_and_never_more_than_a_few_shards(job, hub, tmp_path, aim):
    _run(job, tmp_path / "drop", source_cache="drop", **aim)
    assert 1 < hub.peak <= PEAK
    assert len(set(_shards(hub))) == SHARDS
    assert not list(tmp_path.rglob("model-*"))
    assert not (tmp_path / "drop.partial").exists()
    hub.peak = 0
    hub.log.clear()
    _run(job, tmp_path / "keep", **aim)
    assert hub.peak == SHARDS
    assert len(_shards(hub)) == SHARDS  # each once
    assert _bytes(tmp_path / "drop") == _bytes(tmp_path / "keep")
    source = json.loads((tmp_path / "keep" / "qmoe_manifest.json").read_text())["source"]
    assert source["name"] == REPO
    assert len(source["revision"]) == 40


def test_a_resumed_run_downloads_what_is_still_needed(job, hub, tmp_path):
    aim = {"delta": 8.0, "source_cache": "drop"}
    _run(job, tmp_path / "whole", **aim)
    out = tmp_path / "out"
    record = tmp_path / "out.partial" / "journal" / f"model.layers.{BLOCKS // 2 - 1}.json"
    count = hub.before

    def interrupt(file):  # while the run waits for a shard of its second half
        count(file)
        if record.exists():
            hub.before = count
            os.kill(os.getpid(), signal.SIGINT)

    hub.before = interrupt
    with pytest.raises(InterruptedRunError):
        _run(job, out, **aim)
    hub.log.clear()
    hub.peak = 0
    heard = _run(job, out, **aim)
    assert f"of {BLOCKS} blocks are finished; continuing at block model.layers." in heard[-1]
    rest = {f for n, f in _index(hub).items() if not n.startswith(("model.layers.", "extra."))}
    first = int(heard[-1].rsplit(".", 1)[1])
    ahead = {
        f
        for n, f in _index(hub).items()
        for i in range(first, BLOCKS)
        if n.startswith(f"model.layers.{i}.")
    }
    assert set(_shards(hub)) <= rest | ahead
    assert len(rest | ahead) < SHARDS
    assert hub.peak <= PEAK + 1  # what the interrupted run had read ahead may still lie there
    assert _bytes(out) == _bytes(tmp_path / "whole")
    assert not list(tmp_path.rglob("model-*"))


def _index(hub):
    return json.loads(hub.files["model.safetensors.index.json"])["weight_map"]


def _refused(source, job, tmp_path):
    line = ["compress", str(source), str(tmp_path / "out"), "--calib", job[1].calib]
    done = CliRunner().invoke(main, [*line, "--source-cache", "drop"])
    assert done.exit_code == 2
    assert not list(tmp_path.glob("out*"))
    return done.stderr


def test_a_local_directory_is_refused(job, tmp_path):
    before = _bytes(job[0])
    assert "is a local directory, of which nothing is ever deleted" in _refused(
        job[0], job, tmp_path
    )
    assert _bytes(job[0]) == before


def test_pickles_are_refused(job, hub, tmp_path):
    for name in [f for f in hub.files if f.startswith("model")]:
        del hub.files[name]
    hub.files["pytorch_model.bin"] = b"never read"
    assert "owner/model holds pytorch_model.bin" in _refused(REPO, job, tmp_path)
    assert not any(file == "pytorch_model.bin" for _, file, n in hub.log if n)


@pytest.mark.slow
def test_two_processes_share_the_shards(job, hub, tmp_path):
    aim = {"bits": 2.0, "source_cache": "drop"}
    _run(job, tmp_path / "one", **aim)
    hub.peak = 0
    s = job[1]
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "qmoe"]
    line += ["compress", REPO, str(tmp_path / "two"), "--bits", "2.0", "--calib", s.calib]
    line += ["--calib-tokens", str(s.calib_tokens), "--ctx", str(s.ctx), "--source-cache", "drop"]
    env = hub.environment(tmp_path / "home")
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hub.peak <= PEAK
    assert not list(tmp_path.rglob("model-*"))
    assert _bytes(tmp_path / "two") == _bytes(tmp_path / "one")


def test_a_revision_of_the_source(job, hub, tmp_path):
    hub.branches = {"main": {}, "v2": hub.files}
    name, out = f"{REPO}@v2", tmp_path / "out"
    compress(name, out, job[1])
    source = json.loads((out / "qmoe_manifest.json").read_text())["source"]
    assert (source["name"], source["revision"]) == (REPO, commit_of("v2"))
    text = str(job[1].calib)
    here = evaluate(str(out), text, str(job[0]), ctx=128, tokens=1024)
    assert evaluate(str(out), text, name, ctx=128, tokens=1024) == here
    hub.branches["small"] = {p.name: p.read_bytes() for p in out.iterdir()}
    assert evaluate(f"{REPO}@small", text, name, ctx=128, tokens=1024) == here
    with pytest.raises(SourceError, match="'owner/model' is neither"):
        compress(f"{REPO}@v3", tmp_path / "none", job[1])
