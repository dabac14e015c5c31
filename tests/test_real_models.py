"""docs/real-models.md: every `qmoe` command of the page, as it stands there, on a tiny model of the
same type. Names and sizes are replaced; options are not."""

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from qmoe.cli import main

PAGE = Path(__file__).resolve().parent.parent / "docs" / "real-models.md"
TYPES = ("qwen3_moe", "gpt_oss", "deepseek_v2", "mixtral")
SMALLER = {"--calib-tokens": "1024", "--ctx": "64", "--memory": "8GiB", "--bits": None}


def commands():
    """The lines that begin with `qmoe` inside code blocks, in order."""
    blocks = re.findall(r"```\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    return [line for b in blocks for line in b.splitlines() if line.startswith("qmoe ")]


def known():
    """Those of them that this release has: serving is tested where it is made."""
    return [c for c in commands() if c.split()[1] in main.commands]


def test_the_page_names_every_step_and_every_type():
    text = PAGE.read_text("utf-8")
    steps = {c.split()[1] for c in commands()}
    assert {"compress", "inspect", "verify", "eval", "sweep", "exec", "serve"} <= steps
    assert all(f"| {kind} |" in text for kind in TYPES)
    assert any("--model-bits" in c for c in commands())


def _small(words):
    """The same command at a size for tests."""
    out = list(words)
    for i, word in enumerate(words[:-1]):
        if word in ("--calib-tokens", "--ctx"):
            out[i + 1] = SMALLER[word]
        if word == "--bits" and "," in words[i + 1]:
            out[i + 1] = "1.5,2"  # a sweep of two
        if word == "--methods":
            out[i + 1] = "qmoe"
    return out


@pytest.mark.parametrize("kind", TYPES)
def test_the_commands_run_on_a_tiny_model_of_the_type(kind, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shape = {"hidden_size": 64, "num_hidden_layers": 2} if kind != "deepseek_v2" else {}
    tiny.save(kind, tmp_path / "MODEL", **shape)
    tiny.save_tokenizer(tmp_path / "MODEL")
    tiny.save_text(tmp_path / "wikitext2-test.txt", 600)
    ran = []
    for line in known():
        words = _small(shlex.split(line)[1:])
        if "--model-bits" in words:  # side data of tiny matrices alone takes more than 1.5 bits
            words[words.index("--model-bits") + 1] = "10" if kind == "deepseek_v2" else "6"
        if words[0] in ("serve", "exec"):
            continue  # a server and another tool: tests/test_serve.py and tests/vllm run them
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception!r}"
        if "--json" in words:
            json.loads(done.stdout.strip().splitlines()[-1])
        ran.append(words[0])
    assert ran[:4] == ["compress", "compress", "inspect", "verify"]
    assert (tmp_path / "OUT-1.5").is_dir()
