"""The command line sets no default of its own: its help texts quote those of what it calls."""

import inspect
import re

import click
import pytest
from click.testing import CliRunner

from qmoe.cli import main
from qmoe.compression.settings import DEFAULT_BITS, Settings
from qmoe.engines import chat
from qmoe.engines.chat import model_and_tokenizer
from qmoe.engines.serve import serve
from qmoe.errors import QmoeError
from qmoe.measure.points import Points
from qmoe.measure.score import evaluate
from qmoe.measure.sweep import METHODS, TARGETS
from qmoe.options import given
from qmoe.publish.export import export

ROWS = {"column": "text", "bos": "auto"}
SETTINGS = vars(Settings()) | {"bits": DEFAULT_BITS, "memory": "8GiB"}
SETTINGS |= {"unseen": f"{Settings.unseen:g}"} | {f"calib_{k}": v for k, v in ROWS.items()}
ALL = {
    "compress": SETTINGS | {"ctx": "the model's, at most 2048"},
    "eval": {k: p.default for k, p in inspect.signature(evaluate).parameters.items()}
    | {"tokens": "all"}
    | ROWS,
    "sweep": SETTINGS
    | {
        "bits": ",".join(f"{b:g}" for b in TARGETS),
        "methods": ",".join(METHODS),
        "ctx": Points.ctx,
        "tokens": "all",
    },
    "serve": {k: p.default for k, p in inspect.signature(serve).parameters.items()}
    | {"engine": "transformers"},
    "chat": {k: p.default for k, p in inspect.signature(model_and_tokenizer).parameters.items()}
    | chat.SETTINGS
    | {"temperature": "as the model's generation_config says"},
    "export": {k: p.default for k, p in inspect.signature(export).parameters.items()},
}


def _quoted(command):
    for option in main.commands[command].params:
        if found := re.search(r"\[default: (.*)\]$", getattr(option, "help", None) or ""):
            yield option.name, found.group(1)


@pytest.mark.parametrize("command", ALL)
def test_help_quotes_the_defaults_of_what_is_called(command):
    quoted = dict(_quoted(command))
    assert quoted
    assert quoted == {name: str(ALL[command][name]) for name in quoted}


def test_memory_is_what_help_says():
    assert Settings().memory == 8 * 2**30


def _commands(group, path=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


@pytest.mark.parametrize(("name", "command"), list(_commands(main)))
def test_no_option_is_passed_on_that_was_not_given(name, command):
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.default in (None, False) or not isinstance(option.default, str | int)


def test_a_zero_is_given(tmp_path, monkeypatch):
    """0 equals False, and --unseen 0 is not the default."""
    assert given({"a": 0, "b": 0.0, "c": "", "d": None, "e": False}) == {"a": 0, "b": 0.0, "c": ""}
    seen = {}

    def stop(source, out, settings, *more):
        seen["unseen"] = settings.unseen
        raise QmoeError("far enough")

    monkeypatch.setattr("qmoe.compression.pipeline.compress", stop)
    done = CliRunner().invoke(main, ["compress", "SOURCE", str(tmp_path / "q"), "--unseen", "0"])
    assert "far enough" in done.output
    assert seen == {"unseen": 0}
