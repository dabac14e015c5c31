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
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import qmoe
from qmoe.calib.routing import Parked
from qmoe.cli import main
from qmoe.compression.pipeline import compress
from qmoe.compression.settings import Settings
from qmoe.errors import CalibrationError, SourceError
from qmoe.measure.score import evaluate, load_any
from qmoe.models.streamed import StreamedModel
from qmoe.publish.export import export
from qmoe.publish.verify import verify
from qmoe.source.checkpoint import open_checkpoint

IDS = torch.randint(16, 50, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _logits(model):
    extra = {"decoder_input_ids": IDS[:, :5]} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **extra, use_cache=False).logits


def _source(tiny, folder, family, dtype=torch.float32, **changes):
    model = tiny.make(family, dtype, **changes)
    model.save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return type(model)


def _compress(tiny, source, out, method="rtn", **options):
    text = tiny.save_text(out.with_name("text.txt"), 400)
    options = {"calib_tokens": 96, "ctx": 24, "unseen": 0, **options}
    return compress(str(source), out, Settings(method=method, calib=str(text), **options))


def _edit(directory, **values):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def _exported(folder):
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


# ---- tied parameters -----------------------------------------------------------------------------

TIED = [
    ("qwen3_moe", "lm_head.weight", "model.embed_tokens.weight"),
    ("jetmoe", "lm_head.weight", "model.embed_tokens.weight"),
    ("switch_transformers", "encoder.embed_tokens.weight", "shared.weight"),
    ("switch_transformers", "lm_head.weight", "shared.weight"),
    ("nllb-moe", "model.decoder.embed_tokens.weight", "model.shared.weight"),
]


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize(("family", "copy", "original"), TIED)
def test_tied_parameters_with_values_of_their_own_stay_apart(
    tmp_path, tiny, family, copy, original, ending
):
    source = tmp_path / "source"
    cls = _source(tiny, source, family, tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    tensors[copy] = tensors[original].flip(0).contiguous()
    tiny.rewrite(source, tensors)
    if ending == "bin":
        tiny.to_shards(source, 2, "bin")
    theirs = cls.from_pretrained(source, dtype=torch.float32).eval()
    assert torch.equal(theirs.get_parameter(copy), tensors[copy])
    streamed = StreamedModel(open_checkpoint(source)).whole()
    assert torch.equal(streamed.get_parameter(copy), tensors[copy])
    _compress(tiny, source, tmp_path / "q")
    verify(tmp_path / "q")
    loaded = qmoe.load(tmp_path / "q", dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "again")
    again = qmoe.load(tmp_path / "again", dtype=torch.float32)
    export(tmp_path / "q", tmp_path / "dense", "float32")
    dense = cls.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    for model in (loaded, again, dense):
        assert torch.equal(model.get_parameter(copy), tensors[copy])
        assert torch.equal(model.get_parameter(original), tensors[original])


@pytest.mark.parametrize(("family", "copy", "original"), TIED)
def test_a_stored_copy_stands_for_the_original(tmp_path, tiny, family, copy, original):
    source = tmp_path / "source"
    cls = _source(tiny, source, family, tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    values = tensors.pop(original)
    tiny.rewrite(source, {**tensors, copy: values})
    expected = _logits(cls.from_pretrained(source, dtype=torch.float32).eval())
    streamed = StreamedModel(open_checkpoint(source)).whole()
    if family != "nllb-moe":  # whose experts run as transformers has them only before a repair
        torch.testing.assert_close(_logits(streamed), expected, rtol=1e-5, atol=1e-5)
    _compress(tiny, source, tmp_path / "q")
    loaded = qmoe.load(tmp_path / "q", dtype=torch.float32)
    assert torch.equal(loaded.get_parameter(original), values)
    assert torch.equal(loaded.get_parameter(copy), values)


def test_equal_copies_are_stored_once_and_none_is_an_error(tmp_path, tiny):
    source = tmp_path / "source"
    _source(tiny, source, "qwen3_moe", tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    table = "model.embed_tokens.weight"
    tiny.rewrite(source, {**tensors, "lm_head.weight": tensors[table]})
    _compress(tiny, source, tmp_path / "q")
    export(tmp_path / "q", tmp_path / "dense", "float32")
    assert "lm_head.weight" not in _exported(tmp_path / "dense")
    del tensors[table]
    tiny.rewrite(source, tensors)
    with pytest.raises(SourceError, match="no tensor on disk for"):
        StreamedModel(open_checkpoint(source))


def test_a_head_apart_with_dense_bits(tmp_path, tiny):
    source = tmp_path / "source"
    _source(tiny, source, "qwen3_moe", tie_word_embeddings=False)
    _edit(source, tie_word_embeddings=True)
    head = load_file(source / "model.safetensors")["lm_head.weight"]
    _compress(tiny, source, tmp_path / "q", dense_bits=8)
    loaded = qmoe.load(tmp_path / "q", dtype=torch.float32)
    assert (loaded.lm_head.weight - head).abs().max() < 0.1 * head.abs().max()


# ---- files ---------------------------------------------------------------------------------------


def _shards(directory, tensors, folder=""):
    names = sorted(tensors)
    parts = {f"{folder}model-{i}.safetensors": names[i::2] for i in range(2)}
    (directory / folder).mkdir(exist_ok=True)
    for file, some in parts.items():
        save_file({n: tensors[n] for n in some}, directory / file, {"format": "pt"})
    return {n: file for file, some in parts.items() for n in some}


def _index(directory, where):
    text = json.dumps({"metadata": {}, "weight_map": where})
    (directory / "model.safetensors.index.json").write_text(text)


def _same(source, cls):
    ours = StreamedModel(open_checkpoint(source)).whole()
    theirs = cls.from_pretrained(source, dtype=torch.float32)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_a_whole_file_goes_before_an_index(tmp_path, tiny):
    source = tmp_path / "source"
    cls = _source(tiny, source, "mixtral")
    tensors = load_file(source / "model.safetensors")
    _index(source, _shards(source, {n: t + 1 for n, t in tensors.items()}))
    _same(source, cls)
    for file in source.glob("model-*"):
        file.unlink()  # the index is stale
    _same(source, cls)


@pytest.mark.parametrize("case", ["subfolder", "unnamed", "ghost", "elsewhere", "twice"])
def test_what_the_shards_hold_counts_and_not_the_index(tmp_path, tiny, case):
    source = tmp_path / "source"
    cls = _source(tiny, source, "mixtral")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    where = _shards(source, tensors, "sub/" if case == "subfolder" else "")
    some = sorted(where)[0]
    if case == "unnamed":
        del where[some]
    elif case == "ghost":
        where["model.layers.9.ghost.weight"] = where[some]
    elif case == "elsewhere":
        where[some] = next(f for f in where.values() if f != where[some])
    elif case == "twice":  # the file whose name sorts last wins
        last = load_file(source / "model-1.safetensors")
        save_file({**last, some: tensors[some] + 1}, source / "model-1.safetensors")
    _index(source, where)
    _same(source, cls)


def test_files_outside_the_directory_are_refused(tmp_path, tiny):
    source = tmp_path / "source"
    _source(tiny, source, "mixtral")
    (source / "model.safetensors").rename(tmp_path / "model.safetensors")
    _index(source, {"lm_head.weight": "../model.safetensors"})
    with pytest.raises(SourceError, match="weight_map is missing or malformed"):
        open_checkpoint(source)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
@pytest.mark.parametrize("name", ["experts.1.down_proj.weight", "self_attn.q_proj.weight"])
def test_integers_for_floating_point_weights_are_refused(tmp_path, tiny, dtype, name):
    source = tmp_path / "source"
    _source(tiny, source, "qwen3_moe")
    tensors = load_file(source / "model.safetensors")
    tiny.rewrite(source, {k: v.to(dtype) if k.endswith(name) else v for k, v in tensors.items()})
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(SourceError, match=rf"{name} holds {kind}.*lacks its quantization_config"):
        StreamedModel(open_checkpoint(source))


# ---- classes, dtypes, widths ---------------------------------------------------------------------


@pytest.mark.parametrize("given", ["config", "weights"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_result_is_the_sources(tmp_path, tiny, dtype, given):
    source = tmp_path / "source"
    cls = _source(tiny, source, "glm4_moe", dtype)
    if given == "weights":
        config = json.loads((source / "config.json").read_text())
        del config["dtype"]
        (source / "config.json").write_text(json.dumps(config))
    _compress(tiny, source, tmp_path / "q")
    assert cls.from_pretrained(tmp_path / "q").dtype == dtype
    assert qmoe.load(tmp_path / "q").dtype == dtype


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3", "ernie4_5_moe"])
def test_export_keeps_what_the_family_keeps_in_float32(tmp_path, tiny, family):
    source = tmp_path / "source"
    cls = _source(tiny, source, family)
    _compress(tiny, source, tmp_path / "q")
    export(tmp_path / "q", tmp_path / "dense", "bfloat16")
    stored = _exported(tmp_path / "dense")
    before = load_file(source / "model.safetensors")
    kept = {n for n, t in stored.items() if t.dtype == torch.float32}
    assert kept
    assert all(torch.equal(stored[n], before[n]) for n in kept)
    for name, tensor in cls.from_pretrained(tmp_path / "dense").state_dict().items():
        assert tensor.dtype == torch.bfloat16 or torch.isfinite(tensor).all(), name


@pytest.mark.parametrize("width", [37, 38, 42])
def test_experts_of_any_width(tmp_path, tiny, width):
    source = tmp_path / "source"
    _source(tiny, source, "qwen3_moe", moe_intermediate_size=width)
    _compress(tiny, source, tmp_path / "q", "rd", delta=0.5)
    text = str(tmp_path / "text.txt")
    for dtype in ("float32", "bfloat16"):
        evaluate(
            str(tmp_path / "q"), text, str(source), ctx=24, tokens=96, dtype=dtype, device="cpu"
        )


def test_eval_with_a_reference_of_a_composite_configuration(tmp_path, tiny, generic):
    generic.make("qwen3_vl_moe").save_pretrained(tmp_path / "source")
    tiny.save_tokenizer(tmp_path / "source")
    _compress(tiny, tmp_path / "source", tmp_path / "q")
    text = str(tmp_path / "text.txt")
    score = evaluate(str(tmp_path / "q"), text, str(tmp_path / "source"), ctx=24, tokens=96)
    assert score.kl > 0


@torch.no_grad()
def test_a_loaded_model_can_be_pickled_and_saved_from_the_copy(tmp_path, tiny):
    for family in ("mixtral", "jetmoe", "nllb-moe"):
        folder = tmp_path / family
        _source(tiny, folder / "source", family)
        _compress(tiny, folder / "source", folder / "q")
        model = qmoe.load(folder / "q", dtype=torch.float32)
        _logits(model)  # with whatever the first call leaves behind
        copy = pickle.loads(pickle.dumps(model))
        assert torch.equal(_logits(copy), _logits(model))
        copy.save_pretrained(folder / "again")
        assert torch.equal(
            _logits(qmoe.load(folder / "again", dtype=torch.float32)), _logits(model)
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
    _source(tiny, source, "mixtral")
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
    _source(tiny, source, "mixtral", vocab_size=24)
    with pytest.raises(CalibrationError, match=r"token 'w\d+' .* number \d+, .* have 24 rows"):
        _compress(tiny, source, tmp_path / "q")
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
    _source(tiny, source, "jetmoe")
    _with_start(source, bos_token="<s>")
    _compress(tiny, source, tmp_path / "q")
    modules = json.loads((tmp_path / "q" / "qmoe_manifest.json").read_text())["report"]["modules"]
    for report in modules.values():
        assert sum(report["tokens"]) == 2 * (96 - 4)  # two experts for each, 4 windows


@pytest.mark.parametrize("kind", ["qwen3_5_moe", "llama4"])
def test_the_published_class_is_compressed_and_loaded(tmp_path, tiny, generic, kind):
    name = generic.PUBLISHED[kind]
    model = generic.make(kind, auto="AutoModelForImageTextToText")
    assert type(model).__name__ == name
    model.save_pretrained(tmp_path / "source")
    tiny.save_tokenizer(tmp_path / "source")
    _compress(tiny, tmp_path / "source", tmp_path / "q")
    assert type(qmoe.load(tmp_path / "q")).__name__ == name
    text = str(tmp_path / "text.txt")
    evaluate(str(tmp_path / "q"), text, str(tmp_path / "source"), ctx=24, tokens=96)
    assert type(load_any(str(tmp_path / "source"), "float32", torch.device("cpu"))) is type(model)
    with pytest.raises(qmoe.UnsupportedModelError, match=f"was compressed as {name}"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q")


def test_the_text_only_class_of_a_composite_configuration(tmp_path, tiny, generic):
    """Named under `architectures`, or by nobody: as AutoModelForCausalLM has it."""
    model = generic.make("qwen3_5_moe")
    model.save_pretrained(tmp_path / "source")
    config = generic.config_of("qwen3_5_moe")
    for names in (None, ["Qwen3_5MoeForCausalLM"], ["MixtralForCausalLM"]):
        config.architectures = names
        config.save_pretrained(tmp_path / "source")
        streamed = StreamedModel(open_checkpoint(tmp_path / "source"))
        assert type(streamed.model) is type(model)
        assert streamed.config.model_type == "qwen3_5_moe_text"
