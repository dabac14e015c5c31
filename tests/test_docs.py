"""What README and docs show is run: Python blocks as they stand, commands through the command line.

MODEL, OUT, DEST, text.txt and dev.txt are what a reader would put there: here a tiny model.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from qmoe.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/api.md")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
SMALL = {"compress": ["--calib-tokens", "2048", "--ctx", "64"], "eval": ["--ctx", "64"]}


def blocks(page, language):
    return [
        text for kind, text in BLOCK.findall((ROOT / page).read_text("utf-8")) if kind == language
    ]


def commands(page):
    """The lines that call qmoe, without their remarks."""
    lines = "".join(blocks(page, "")).splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.startswith("qmoe ")]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny):
    """A folder with MODEL, text.txt and dev.txt, and OUT, its compressed form."""
    folder = tmp_path_factory.mktemp("docs")
    tiny.save("mixtral", folder / "MODEL")
    tiny.save_tokenizer(folder / "MODEL")
    tiny.save_text(folder / "text.txt", 4000)
    tiny.save_text(folder / "dev.txt", 600)
    before = os.getcwd()
    os.chdir(folder)
    try:
        arguments = ["compress", "MODEL", "OUT", "--calib", "text.txt", *SMALL["compress"]]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        (folder / "OUT").rename(folder / "ready")
    finally:
        os.chdir(before)
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_as_they_stand(page, place, tmp_path):
    for name in ("MODEL", "text.txt", "dev.txt"):
        (tmp_path / name).symlink_to(place / name)
    script = "".join(blocks(page, "python"))
    if "qmoe.compress(" not in script:
        (tmp_path / "OUT").symlink_to(place / "ready")
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_commands_of_the_readme_run(place, tmp_path, monkeypatch):
    for name in ("MODEL", "text.txt", "dev.txt"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    ran = []
    for line in commands("README.md"):
        _, command, *rest = shlex.split(line.replace("[", "").replace("]", ""))
        if command not in ("compress", "eval", "inspect", "verify", "export"):
            continue
        result = CliRunner().invoke(main, [command, *rest, *SMALL.get(command, [])])
        assert result.exit_code == 0, (line, result.output)
        ran.append(command)
    assert {"compress", "eval", "inspect", "verify", "export"} <= set(ran)


@pytest.mark.parametrize(
    "page",
    sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("**/*.md") if ".venv" not in p.parts),
)
def test_every_command_and_option_of_the_docs_exists(page):
    for line in commands(page):
        _, name, *rest = shlex.split(line.replace("[", "").replace("]", ""))
        command = main.commands[name]
        if hasattr(command, "commands"):
            command = command.commands[rest[0]]
        known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        passed_on = command.context_settings.get("ignore_unknown_options")
        for word in rest:
            if word == "--":
                break
            assert not word.startswith("--") or word in known or passed_on, (line, word)


def test_the_tree_in_the_readme_is_todays():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "tree.py"], capture_output=True, text=True, check=True
    )
    tree = done.stdout.rstrip()
    assert len(tree.splitlines()) <= 30
    assert tree in (ROOT / "README.md").read_text("utf-8")


def test_the_drawings_are_those_of_their_source(tmp_path):
    source = ROOT / "docs" / "drawings" / "draw.py"
    copy = tmp_path / "draw.py"
    copy.write_bytes(source.read_bytes())
    subprocess.run([sys.executable, copy], check=True)
    for drawn in tmp_path.glob("*.svg"):
        assert drawn.read_bytes() == (source.parent / drawn.name).read_bytes()
