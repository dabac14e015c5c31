"""Checkpoints as people have them: what transformers reads from a directory is what is compressed,
loaded, exported and scored."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import (
    compressed,
    exported,
    logits_of,
    source_of,
)
from click.testing import CliRunner
from safetensors.torch import load_file
from shrunk import config_of, make
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import qmoe
from qmoe.calib.routing import Parked
from qmoe.cli import main
from qmoe.errors import CalibrationError
from qmoe.measure.score import evaluate, load_any
from qmoe.models.streamed import StreamedModel
from qmoe.publish.export import export
from qmoe.source.checkpoint import open_checkpoint

# ---- classes, dtypes, widths ---------------------------------------------------------------------


@pytest.mark.parametrize("given", ["config", "weights"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_result_is_the_sources(tmp_path, tiny, dtype, given):
    source = tmp_path / "source"
    cls = source_of(tiny, source, "glm4_moe", dtype)
    if given == "weights":
        config = json.loads((source / "config.json").read_text())
        del config["dtype"]
        (source / "config.json").write_text(json.dumps(config))
    compressed(tiny, source, tmp_path / "q")
    assert cls.from_pretrained(tmp_path / "q").dtype == dtype
    assert qmoe.load(tmp_path / "q").dtype == dtype


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3", "ernie4_5_moe"])
def test_export_keeps_what_the_family_keeps_in_float32(tmp_path, tiny, family):
    source = tmp_path / "source"
    cls = source_of(tiny, source, family)
    compressed(tiny, source, tmp_path / "q")
    export(tmp_path / "q", tmp_path / "dense", "bfloat16")
    stored = exported(tmp_path / "dense")
    before = load_file(source / "model.safetensors")
    kept = {n for n, t in stored.items() if t.dtype == torch.float32}
    assert kept
    assert all(torch.equal(stored[n], before[n]) for n in kept)
    for name, tensor in cls.from_pretrained(tmp_path / "dense").state_dict().items():
        assert tensor.dtype == torch.bfloat16 or torch.isfinite(tensor).all(), name


@pytest.mark.parametrize("width", [37, 38, 42])
def test_experts_of_any_width(tmp_path, tiny, width):
    source = tmp_path / "source"
    source_of(tiny, source, "qwen3_moe", moe_intermediate_size=width)
    compressed(tiny, source, tmp_path / "q", "rd", delta=0.5)
    text = str(tmp_path / "text.txt")
    for dtype in ("float32", "bfloat16"):
        evaluate(
            str(tmp_path / "q"), text, str(source), ctx=24, tokens=96, dtype=dtype, device="cpu"
        )


def test_eval_with_a_reference_of_a_composite_configuration(tmp_path, tiny):
    make("qwen3_vl_moe").save_pretrained(tmp_path / "source")
    tiny.save_tokenizer(tmp_path / "source")
    compressed(tiny, tmp_path / "source", tmp_path / "q")
    text = str(tmp_path / "text.txt")
    score = evaluate(str(tmp_path / "q"), text, str(tmp_path / "source"), ctx=24, tokens=96)
    assert score.kl > 0


@torch.no_grad()
def test_a_loaded_model_can_be_pickled_and_saved_from_the_copy(tmp_path, tiny):
    for family in ("mixtral", "jetmoe", "nllb-moe"):
        folder = tmp_path / family
        source_of(tiny, folder / "source", family)
        compressed(tiny, folder / "source", folder / "q")
        model = qmoe.load(folder / "q", dtype=torch.float32)
        logits_of(model)  # with whatever the first call leaves behind
        copy = pickle.loads(pickle.dumps(model))
        assert torch.equal(logits_of(copy), logits_of(model))
        copy.save_pretrained(folder / "again")
        assert torch.equal(
            logits_of(qmoe.load(folder / "again", dtype=torch.float32)), logits_of(model)
        )


def test_loops_are_cached_elsewhere_if_the_package_cannot_be_written(tmp_path):
    code = (
        "import os, qmoe.system.loops_cache as c; c._writable = lambda path: False; "
        "c.settle_loops_cache(); print(os.environ['NUMBA_CACHE_DIR']); import qmoe.codec"
    )
    env = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**env, "TMPDIR": str(tmp_path)},
        check=True,
    )
    folder = Path(done.stdout.strip())
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o077 == 0
    folder.chmod(0o777)  # somebody else could have put code there
    env["TMPDIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert Path(done.stdout.strip()) != folder


# ---- text ----------------------------------------------------------------------------------------


def _with_start(source, **names):
    tokenizer = AutoTokenizer.from_pretrained(source, **names)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save_pretrained(source)


def test_the_plan_says_how_windows_begin(tmp_path, tiny):
    source = tmp_path / "source"
    source_of(tiny, source, "mixtral")
    _with_start(source)
    text = tiny.save_text(tmp_path / "text.txt", 400)
    words = text.read_text().split()
    fixed = ["compress", str(source), "--calib", str(text), "--method", "rtn", "--ctx", "32"]

    def said(out, *options):
        line = [*fixed, str(tmp_path / out), "--calib-tokens", "96", *options]
        done = CliRunner().invoke(main, line)
        assert done.exit_code == 0, (done.output, done.exception)
        return done.stderr

    plan = said("a")
    assert "each beginning with '<s>'" in plan
    assert f"the first: '{' '.join(words[:3])}" in plan
    assert "no special token" in said("b", "--calib-bos", "off")
    _edit_tokenizer = CliRunner().invoke(
        main, ["eval", str(source), "--text", str(text), "--ctx", "32", "--bos", "on"]
    )
    assert "has no begin-of-text token" in _edit_tokenizer.stderr
    done = CliRunner().invoke(main, ["eval", str(source), "--text", str(text), "--ctx", "32"])
    assert "evaluation text: " in done.stderr
    assert "each beginning with '<s>'" in done.stderr


def test_tokens_without_an_embedding(tmp_path, tiny):
    source = tmp_path / "source"
    source_of(tiny, source, "mixtral", vocab_size=24)
    with pytest.raises(CalibrationError, match=r"token 'w\d+' .* number \d+, .* have 24 rows"):
        compressed(tiny, source, tmp_path / "q")
    text = str(tmp_path / "text.txt")
    with pytest.raises(CalibrationError, match="have 24 rows"):
        evaluate(str(source), text, ctx=24)


# ---- rows that a router orders -------------------------------------------------------------------


def _parked(token, expert, hidden):
    n = len(token)
    index = torch.tensor(expert, dtype=torch.int32)[:, None]
    return Parked(
        torch.tensor(hidden)[:, None].float(),
        index,
        torch.ones(n, 1),
        [n],
        torch.zeros(n, 1, 1),
        torch.tensor(token),
    )


def test_rows_are_paired_by_token_and_expert():
    # token 2 goes to experts 0 and 1 here and to 0 and 2 there
    ours = _parked([0, 1, 2, 2, 0, 1], [0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5])
    there = _parked([2, 1, 0, 2, 1, 0], [0, 0, 0, 2, 2, 2], [0, 1, 2, 3, 4, 5])
    assert ours.partners(there, 3).tolist() == [2, 1, 0, -1, 5, 4]
    same = _parked([2, 1, 0, 2, 1, 0], [0, 0, 0, 2, 2, 2], [7, 8, 9, 7, 8, 9])
    assert ours.partners(same, 3).tolist()[3] in (0, 3)  # the token itself is what experts take
    unused = _parked([0, 1, 2], [0, 3, 3], [0, 1, 2])  # 3: no expert
    assert ours.partners(unused, 3).tolist() == [0, -1, -1, -1, -1, -1]
    ours.token = None
    assert ours.partners(there, 3) is None


def test_no_special_token_teaches_experts_that_get_ordered_rows(tmp_path, tiny):
    source = tmp_path / "source"
    source_of(tiny, source, "jetmoe")
    _with_start(source, bos_token="<s>")
    compressed(tiny, source, tmp_path / "q")
    modules = json.loads((tmp_path / "q" / "qmoe_manifest.json").read_text())["report"]["modules"]
    for report in modules.values():
        assert sum(report["tokens"]) == 2 * (96 - 4)  # two experts for each, 4 windows


@pytest.mark.parametrize("kind", ["qwen3_5_moe", "llama4"])
def test_the_published_class_is_compressed_and_loaded(tmp_path, tiny, generic, kind):
    name = generic.PUBLISHED[kind]
    model = make(kind, auto="AutoModelForImageTextToText")
    assert type(model).__name__ == name
    model.save_pretrained(tmp_path / "source")
    tiny.save_tokenizer(tmp_path / "source")
    compressed(tiny, tmp_path / "source", tmp_path / "q")
    assert type(qmoe.load(tmp_path / "q")).__name__ == name
    text = str(tmp_path / "text.txt")
    evaluate(str(tmp_path / "q"), text, str(tmp_path / "source"), ctx=24, tokens=96)
    assert type(load_any(str(tmp_path / "source"), "float32", torch.device("cpu"))) is type(model)
    with pytest.raises(qmoe.UnsupportedModelError, match=f"was compressed as {name}"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q")


def test_the_text_only_class_of_a_composite_configuration(tmp_path, tiny):
    """Named under `architectures`, or by nobody: as AutoModelForCausalLM has it."""
    model = make("qwen3_5_moe")
    model.save_pretrained(tmp_path / "source")
    config = config_of("qwen3_5_moe")
    for names in (None, ["Qwen3_5MoeForCausalLM"], ["MixtralForCausalLM"]):
        config.architectures = names
        config.save_pretrained(tmp_path / "source")
        streamed = StreamedModel(open_checkpoint(tmp_path / "source"))
        assert type(streamed.model) is type(model)
        assert streamed.config.model_type == "qwen3_5_moe_text"


def test_a_class_that_transformers_does_not_have_keeps_its_name(tmp_path, tiny):
    """Phi-3.5-MoE is PhiMoEForCausalLM for its publisher and for vLLM."""
    source = tiny.save("phimoe", tmp_path / "source")
    tiny.save_tokenizer(source)
    config = json.loads((source / "config.json").read_text())
    config["architectures"] = ["PhiMoEForCausalLM"]
    (source / "config.json").write_text(json.dumps(config))
    compressed(tiny, source, tmp_path / "q")
    export(tmp_path / "q", tmp_path / "plain")
    for made in (tmp_path / "q", tmp_path / "plain"):
        config = json.loads((made / "config.json").read_text())
        assert config["architectures"] == ["PhiMoEForCausalLM"]
    assert type(qmoe.load(tmp_path / "q")).__name__ == "PhimoeForCausalLM"
