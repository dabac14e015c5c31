"""The calibration text of the package: what it holds, how models read it, and what it is worth."""

import copy
import itertools
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from qmoe.calib import default_text
from qmoe.calib.batches import prepare
from qmoe.compression.pipeline import compress
from qmoe.compression.settings import Settings
from qmoe.errors import CalibrationError
from qmoe.measure.score import evaluate
from qmoe.store.inspect import inspect

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "calib" / "default"
DOMAINS = ROOT / "examples" / "tiny-domains"
TEXTS = ROOT / "examples" / "text"
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(DOMAINS)


def _kind(row):
    return row["source"].split(",")[0]


def test_at_most_a_megabyte_and_every_source_is_named():
    assert (FOLDER / "text.jsonl").stat().st_size <= 1_000_000
    readme = (FOLDER / "README.md").read_text("utf-8")
    for row in default_text.rows():
        assert _kind(row) in readme, row["source"]
        assert row.keys() == {"source", "messages" if "messages" in row else "text"}


@pytest.mark.parametrize("part", [8, 3, 1])
def test_every_beginning_is_the_same_mix(part):
    rows = list(default_text.rows())
    size = len(json.dumps(rows))

    def shares(some):
        found = {}
        for row in some:
            found[_kind(row)] = found.get(_kind(row), 0) + len(json.dumps(row))
        return {kind: n / sum(found.values()) for kind, n in found.items()}

    whole, taken, beginning = shares(rows), 0, []
    for row in rows:
        beginning.append(row)
        taken += len(json.dumps(row))
        if taken >= size / part:
            break
    for kind, share in whole.items():
        assert shares(beginning).get(kind, 0) == pytest.approx(share, abs=0.06), kind


def test_shares_nothing_with_the_evaluation_texts():
    width = 40
    squeezed = re.sub(r"\s+", " ", (FOLDER / "text.jsonl").read_text("utf-8").replace("\\n", " "))
    grams = {squeezed[i : i + width] for i in range(len(squeezed) - width)}
    for path in [TEXTS / "dev.txt", *(TEXTS / "domains").glob("dev_*.txt")]:
        text = re.sub(r"\s+", " ", path.read_text("utf-8"))
        # every gram of the evaluation text at a multiple of its width: a longer copy holds one
        shared = [text[i : i + width] for i in range(0, len(text) - width, width)]
        shared = [gram for gram in shared if gram in grams and len(set(gram)) > 12]
        assert shared == [], path.name


def test_windows_are_the_beginning_of_the_token_stream(tokenizer):
    stream = list(itertools.chain(*itertools.islice(default_text.token_stream(tokenizer), 12)))
    found = default_text.windows(tokenizer, 2000, 256)
    assert found.shape == (7, 256)
    assert found.flatten().tolist() == stream[: 7 * 256]
    first = next(default_text.rows())["text"]
    assert tokenizer.decode(found[0]) == first[: len(tokenizer.decode(found[0]))]


def test_rows_end_with_the_end_of_text_token_or_with_empty_lines(tokenizer):
    row = next(default_text.token_stream(tokenizer))
    assert row[-1] == tokenizer.eos_token_id
    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    row = next(default_text.token_stream(without))
    assert tokenizer.decode(row).endswith("\n\n\n")


def test_a_chat_template_is_applied_to_the_dialogue_and_to_nothing_else(tokenizer):
    dialogue = next(i for i, r in enumerate(default_text.rows()) if "messages" in r)
    plain = [tokenizer.decode(ids) for ids in default_text.token_stream(tokenizer)]
    tokenizer.chat_template = TEMPLATE
    templated = [tokenizer.decode(ids) for ids in default_text.token_stream(tokenizer)]
    row = list(default_text.rows())[dialogue]
    for messages in (row["messages"],):
        for m in messages:
            assert f"<|{m['role']}|>{m['content']}<|end|>" in templated[dialogue]
            assert m["content"] in plain[dialogue]
    rows = list(default_text.rows())
    differing = [i for i, (a, b) in enumerate(zip(plain, templated, strict=True)) if a != b]
    assert differing == [i for i, r in enumerate(rows) if "messages" in r]
    assert "chat template" in default_text.describe(tokenizer, 1000, 1000)


def test_less_text_than_asked_for_is_said(tokenizer):
    assert "300000 tokens of 900000 asked for" in default_text.describe(tokenizer, 900000, 300000)
    assert "asked for" not in default_text.describe(tokenizer, 131072, 130816)


@pytest.mark.parametrize("rows", [{"pack": True}, {"chat": True}, {"column": "body"}])
def test_options_for_rows_need_a_text_of_ones_own(rows, tokenizer):
    config = AutoTokenizer  # not reached
    with pytest.raises(CalibrationError, match="give --calib with them"):
        prepare(tokenizer, _Config, None, 1000, 128, 0, **rows)
    assert config


class _Config:
    is_encoder_decoder = False


def test_compress_model_out_and_nothing_else(tiny, tmp_path):
    """A user's shortest command, in a process of its own."""
    source = tiny.save("mixtral", tmp_path / "source", hidden_size=64, num_hidden_layers=1)
    tiny.save_tokenizer(source)
    line = [sys.executable, "-m", "qmoe", "compress", str(source), str(tmp_path / "out"), "--json"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "calibration: the bundled text" in done.stderr
    found = inspect(tmp_path / "out")
    assert found.settings["calib"] == "bundled"
    assert found.settings["bits"] == 0.8
    assert json.loads(done.stdout.splitlines()[-1])["bits_as_read"] == found.bits_as_read


def test_the_wheel_holds_the_text(tmp_path):
    line = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*line, "-q", "-w", str(tmp_path)], capture_output=True, text=True, check=False
    )
    if "No module named pip" in done.stderr:
        pytest.skip("pip is not installed")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        assert {"qmoe/calib/default/text.jsonl", "qmoe/calib/default/README.md"} <= {*z.namelist()}


@pytest.mark.slow
def test_on_every_domain_at_least_as_good_as_the_text_of_another(tmp_path):
    """KL on three kinds of text, calibrated on the bundled text and on one kind alone."""
    torch.manual_seed(0)
    kinds = ("en", "zh", "py")
    kl = {}
    for name in (*kinds, None):
        calib = None if name is None else str(TEXTS / "domains" / f"calib_{name}.txt")
        out = tmp_path / str(name)
        settings = Settings("rd", calib, calib_tokens=16384, ctx=256, bits=0.8)
        compress(str(DOMAINS), out, settings)
        for kind in kinds:
            text = str(TEXTS / "domains" / f"dev_{kind}.txt")
            kl[name, kind] = evaluate(str(out), text, str(DOMAINS), 256, 8192).kl
    for kind in kinds:
        elsewhere = min(kl[other, kind] for other in kinds if other != kind)
        assert kl[None, kind] <= elsewhere, kl
