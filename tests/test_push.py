"""`qmoe push`: what arrives is what was verified, with a card that holds the figures."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import qmoe
from qmoe.cli import main
from qmoe.publish.verify import verify
from qmoe.store.inspect import inspect

REPO, TOKEN = "owner/small", "hf_sesame"
SCORE = {"perplexity": 12.5, "nll": 2.5257, "tokens": 4096, "reference_perplexity": 10.0}
SCORE |= {"reference_nll": 2.3026, "kl": 0.03125, "top1_agreement": 0.75}


@pytest.fixture
def out(compressed, tmp_path):
    """A compressed checkpoint to push, with a file that is not part of it."""
    copy = shutil.copytree(compressed[0], tmp_path / "out")
    (copy / "notes.txt").write_text("not for everyone")
    return copy


@pytest.fixture
def hub(serve_hub, monkeypatch, tmp_path):
    """A hub without the repository, and a token for it."""
    served = serve_hub({}, repo=REPO, exists=False)
    served.attach(monkeypatch, tmp_path / "home", TOKEN)
    return served


def _push(out, *options, code=0):
    done = CliRunner().invoke(main, ["push", str(out), REPO, *options])
    assert done.exit_code == code, (done.output, done.exception)
    assert "Traceback" not in done.output
    return done


def _files(out):
    return {p.name: p.read_bytes() for p in out.iterdir() if p.name != "notes.txt"}


def _card(files):
    text = files["README.md"].decode()
    front = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL)
    return yaml.safe_load(front[1]), front[2]


def test_everything_arrives_in_one_commit(out, hub, tmp_path):
    before = _files(out)
    (tmp_path / "score.json").write_text("perplexity 12.500\n" + json.dumps(SCORE) + "\n")
    options = ["--base", "them/big", "--license", "mit", "--eval", str(tmp_path / "score.json")]
    done = _push(out, "--private", "--json", *options)
    assert hub.created["visibility"] == "private"
    assert [c["branch"] for c in hub.commits] == ["main"]
    sent = dict(hub.files)
    front, text = _card(sent)
    del sent["README.md"]
    assert sent == before == _files(out)  # nothing was added to the directory, the card neither
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["repo"] == REPO
    assert found["stored_bytes"] == sum(map(len, before.values()))

    assert front["base_model"] == "them/big"
    assert front["license"] == "mit"
    assert front["pipeline_tag"] == "text-generation"
    assert front["library_name"] == "transformers"
    assert {"qmoe", "moe", "mixtral"} <= set(front["tags"])
    figures = inspect(out)
    assert f"**{figures.bits_per_weight:.3f} bits per weight**" in text
    assert f"| bytes | {figures.stored_bytes:,} |" in text
    assert "| perplexity | 12.500 (+25.00 %) |" in text
    assert "| same most likely token | 75.0 % |" in text
    modules = len({row.module for row in figures.layers})  # in each, the first expert
    assert f"experts, {modules} saw no calibration token" in text
    assert f"- {modules} experts: no tokens: rounded" in text
    assert "| method | `round` |" in text
    for row in figures.layers:
        shown = f"| `{row.module}` | {row.projection} | {row.bits:.3f} |"
        assert shown in text


def test_what_was_pushed_loads(out, hub, compressed):
    _push(out)
    by_transformers = AutoModelForCausalLM.from_pretrained(REPO, dtype=torch.float32)
    model = qmoe.load(REPO, dtype=torch.float32)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = compressed[1](input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(by_transformers(input_ids=ids).logits, model(input_ids=ids).logits)
    assert verify(model.qmoe_directory).files == len(_files(out)) - 1  # all but the manifest


SCRIPT = """
import sys
from transformers import AutoModelForCausalLM
assert "qmoe" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
import qmoe.inference.experts as e
print(type(model).__name__, sum(isinstance(m, e.EncodedExperts) for m in model.modules()))
model.save_pretrained(sys.argv[2])
"""


def _without_import(directory, again, env):
    """Loads a checkpoint in a process that does not import qmoe; saves it again."""
    command = [sys.executable, "-c", SCRIPT, str(directory), str(again)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env)


def test_code_in_the_checkpoint_makes_the_import_needless(out, hub, tmp_path):
    _push(out, "--with-code")
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, data in hub.files.items():
        (copy / name).write_bytes(data)
    assert verify(copy).files == verify(out).files + 1
    env = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = _without_import(copy, tmp_path / "again", env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "MixtralForCausalLM"
    assert int(done.stdout.split()[1]) > 0
    verify(tmp_path / "again")  # the code came along
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"]
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        known = qmoe.load(out)(input_ids=ids).logits
        for where in (copy, tmp_path / "again"):
            assert torch.equal(qmoe.load(where)(input_ids=ids).logits, known)
    plain = _without_import(out, tmp_path / "never", env)
    assert plain.returncode != 0  # off by default


def test_compress_writes_the_same_code(tiny, tmp_path):
    source = tiny.save("mixtral", tmp_path / "source")
    tiny.save_tokenizer(source)
    text = tiny.save_text(tmp_path / "text.txt", 400)
    made = tmp_path / "q"
    options = ["--method", "rtn", "--calib", text, "--calib-tokens", 256, "--ctx", 32]
    command = ["compress", source, made, *options, "--with-code"]
    done = CliRunner().invoke(main, [str(c) for c in command])
    assert done.exit_code == 0, (done.output, done.exception)
    verify(made)  # the manifest has the file and its checksum
    assert "modeling_qmoe.py" in json.loads((made / "qmoe_manifest.json").read_text())["files"]
    env = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = _without_import(made, tmp_path / "again", env)
    assert done.returncode == 0, done.stderr
    name, modules = done.stdout.split()
    assert (name, int(modules)) == ("MixtralForCausalLM", len(qmoe.inspect(made).layers) // 2)
    file = made / "modeling_qmoe.py"
    file.write_text(file.read_text() + "print('changed')\n")
    with pytest.raises(qmoe.CorruptError, match=re.escape("modeling_qmoe.py")):
        verify(made)


def test_a_second_push_replaces_the_first(out, hub, build_model, write_compressed, tmp_path):
    _push(out)
    large = dict(hub.objects)
    hub.files["qmoe-00099-of-00099.safetensors"] = b"of an earlier format"
    hub.received.clear()
    _push(out, "--message", "again")
    assert not hub.received  # the hub has these bytes already
    assert hub.commits[-1]["summary"] == "again"
    assert set(hub.files) == {*_files(out), "README.md"}
    write_compressed(build_model("mixtral", seed=1), tmp_path / "other")
    _push(tmp_path / "other")
    assert set(hub.files) == {*_files(tmp_path / "other"), "README.md"}
    assert hub.files["qmoe_manifest.json"] == (tmp_path / "other/qmoe_manifest.json").read_bytes()
    assert hub.objects.keys() > large.keys()


def test_a_branch_and_a_card_of_ones_own(out, hub):
    (out / "README.md").write_text("---\ntags: [mine]\n---\nMine.\n")
    assert verify(out).files == len(_files(out)) - 2
    _push(out, "--revision", "half")
    assert hub.branches["half"]["README.md"] == (out / "README.md").read_bytes()
    assert set(hub.branches["half"]) == set(_files(out))
    assert not hub.files
    assert qmoe.load(f"{REPO}@half").qmoe_manifest == qmoe.load(out).qmoe_manifest


def test_a_damaged_checkpoint_is_not_sent(out, hub):
    shard = next(out.glob("qmoe*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    done = _push(out, code=2)
    assert "is corrupt" in done.stderr
    assert hub.created is None
    assert not hub.commits


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_without_permission(out, hub, monkeypatch, token, tmp_path):
    hub.attach(monkeypatch, tmp_path / "home", token)
    done = _push(out, code=2)
    assert "the hub does not let us write 'owner/small'; log in with `hf auth login`" in done.stderr
    assert not hub.commits


def test_without_connection(out, hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    done = _push(out, code=2)
    assert "'owner/small' cannot be pushed (ConnectError" in done.stderr


def test_what_stands_in_the_way(out, hub, tmp_path):
    hub.exists = True
    hub.files["model.safetensors"] = b"another model"
    assert "holds model.safetensors, weights that" in _push(out, code=2).stderr
    assert "exists and is public" in _push(out, "--private", code=2).stderr
    for text in ("", "[1]", '{"perplexity": 3}', '{"perplexity": "low", "tokens": 1}', "{"):
        (tmp_path / "score.json").write_text(text)
        done = _push(out, "--eval", str(tmp_path / "score.json"), code=2)
        assert "the output of `qmoe eval --json`" in done.stderr
    assert not hub.commits
