"""What a user gets for input that cannot work: one sentence on stderr, exit code 2, no output."""

import json
import os
import shutil

import checkpoints
import mutations
import pytest
import torch
from click.testing import CliRunner
from container_parts import reseal
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from qmoe.cli import main
from qmoe.errors import CorruptError, QmoeError
from qmoe.inference.load import load
from qmoe.measure.score import load_any
from qmoe.models.classes import check_generation


@pytest.fixture
def source(tmp_path, tiny):
    """A sound Qwen3-MoE checkpoint with a tokenizer, free to be damaged."""
    made = tiny.save("qwen3_moe", tmp_path / "source")
    tiny.save_tokenizer(made)
    return made


@pytest.fixture
def refused(tmp_path, tiny):
    """``refused(directory, *options, words=400)``: the sentence that `qmoe compress` ends with."""

    def run(directory, *options, words=400, out=None):
        text = tiny.save_text(tmp_path / "text.txt", words)
        out = out or tmp_path / "out"
        before = sorted(os.listdir(out)) if os.path.isdir(out) else None
        line = ["compress", str(directory), str(out), "--calib", str(text), "--method", "rtn"]
        done = CliRunner().invoke(main, [*line, "--calib-tokens", "128", "--ctx", "32", *options])
        assert done.exit_code == 2, (done.output, done.exception)
        said = [s for s in done.stderr.splitlines() if s.startswith("qmoe: ")]
        assert len(said) == 1, done.stderr
        assert "Traceback" not in done.output
        after = sorted(os.listdir(out)) if os.path.isdir(out) else None
        assert before == after
        return said[0]

    return run


def _config(directory, **changes):
    file = directory / "config.json"
    config = json.loads(file.read_text())
    if "num_experts" in changes:  # a configuration knows the number under two names
        config.pop("num_local_experts", None)
    file.write_text(json.dumps(config | changes))


def _tensors(directory, change):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"


def test_unknown_model_type(source, refused):
    _config(source, model_type="nonesuch")
    assert "model type 'nonesuch' is not known to transformers" in refused(source)


def test_remote_code_is_not_run_unasked(source, refused):
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    _config(source, model_type="own_moe", auto_map=code)
    (source / "own.py").write_text("raise SystemExit('this must not run')\n")
    assert "brings its own code; read it, then pass --trust-remote-code" in refused(source)


def test_eval_of_what_cannot_be_loaded(source, tmp_path, tiny):
    """As a model and as a reference; nothing is asked and no code is run."""
    text = str(tiny.save_text(tmp_path / "text.txt", 100))
    good = shutil.copytree(source, tmp_path / "good")

    def said(model, *options):
        line = ["eval", str(model), "--text", text, "--ctx", "32", *options]
        done = CliRunner().invoke(main, line)
        assert done.exit_code == 2, (done.output, done.exception)
        lines = [s for s in done.stderr.splitlines() if s.startswith("qmoe: ")]
        assert len(lines) == 1, done.stderr  # beside the bars of transformers
        assert "Traceback" not in done.output
        return lines[0]

    for file in source.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer can be read" in said(source)
    _config(source, model_type="nonesuch")
    assert "model type 'nonesuch' is not known to transformers" in said(source)
    assert "model type 'nonesuch' is not known" in said(good, "--reference", str(source))
    _config(source, model_type="own_moe", auto_map={"AutoModelForCausalLM": "own.OwnModel"})
    assert "brings its own code; read it, then pass --trust-remote-code" in said(source)


def test_a_model_without_experts(tmp_path, tiny, refused):
    config = AutoConfig.for_model("llama", **tiny.BASE)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    assert "has no mixture-of-experts module" in refused(tmp_path / "dense")


def test_a_model_that_writes_no_text(tmp_path, refused):
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(
        "vit", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    AutoModel.from_config(config).save_pretrained(tmp_path / "vit")
    assert "is not a language model" in refused(tmp_path / "vit")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": 6}, "4 tensors (numbers 0 to 3) for the 6 experts of"),
        ({"num_experts": 2}, "4 tensors (numbers 0 to 3) for the 2 experts of"),
        ({"moe_intermediate_size": 48}, "does not match its config"),
        ({"vocab_size": 256}, "config.json asks for"),
        ({"num_hidden_layers": 4}, "no tensor on disk for model.layers.3."),
        ({"hidden_size": 128}, "config.json asks for"),
    ],
)
def test_tensors_that_do_not_match_the_config(source, refused, changes, words):
    _config(source, **changes)
    assert words in refused(source)


def test_a_missing_tensor(source, refused):
    _tensors(source, lambda t: t.pop("model.norm.weight"))
    assert "no tensor on disk for model.norm.weight" in refused(source)


def test_a_missing_expert(source, refused):
    _tensors(source, lambda t: t.pop(EXPERT))
    assert "3 tensors (numbers 0 to 3) for the 4 experts of" in refused(source)


@pytest.mark.parametrize("value", [0, 10**6, 10**9])
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mixtral", "intermediate_size"),
        ("qwen3_moe", "num_attention_heads"),
        ("granitemoe", "hidden_size"),
        ("llama4_text", "hidden_size"),
        ("gpt_oss", "head_dim"),
        ("jamba", "mamba_d_state"),
        ("jamba", "mamba_expand"),
        ("jetmoe", "kv_channels"),
        ("switch_transformers", "num_experts"),
    ],
)
def test_sizes_that_no_tensor_supports(tmp_path, tiny, refused, family, name, value):
    """Nothing of such a size is made, and none is an error of transformers' own."""
    source = tiny.save(family, tmp_path / "source")
    _config(source, **{name: value})
    with mutations.limited():
        message = refused(source)
        assert "config.json" in message
        assert "Error" not in message or value == 0  # of building it: a division by zero, say
        with pytest.raises(QmoeError):
            load_any(str(source), "float32", torch.device("cpu"))


def test_tables_larger_than_the_weights(tmp_path, tiny, refused):
    """Of a size that no tensor has: DeepSeek's rotary table is cut from its own."""
    source, out = tiny.save("deepseek_v3", tmp_path / "source"), tmp_path / "q"
    tiny.save_tokenizer(source)
    checkpoints.compressed(tiny, source, out)
    for folder in (source, out):
        checkpoints.edit(folder, head_dim=10**9)
    reseal(out)
    with mutations.limited():
        assert "rotary_emb.inv_freq of shape (500000000,)" in refused(source, out=tmp_path / "new")
    with mutations.limited(), pytest.raises(CorruptError, match="asks for tables of"):
        load(out)


@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size"])
@pytest.mark.parametrize("value", [0, 10**6])
def test_sizes_of_a_model_without_experts(tmp_path, tiny, name, value):
    config = AutoConfig.for_model("llama", **tiny.BASE)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    _config(tmp_path / "dense", **{name: value})
    with mutations.limited(), pytest.raises(QmoeError, match=r"config\.json"):
        load_any(str(tmp_path / "dense"), "float32", torch.device("cpu"))


def test_one_expert_of_another_shape(source, refused):
    _tensors(source, lambda t: t.update({EXPERT: torch.zeros(64, 16)}))
    message = refused(source)
    assert "(64, 16)" in message
    assert "expert 2 of model.layers.1.mlp.experts has a down matrix" in message


@pytest.mark.parametrize("shape", [(), (0,), (64,), (0, 32), (64, 0), (2, 64, 32)])
@pytest.mark.parametrize("name", [EXPERT, EXPERT.replace("down", "up")])
def test_one_expert_of_no_matrix(source, refused, name, shape):
    _tensors(source, lambda t: t.update({name: torch.zeros(shape)}))
    assert "config" in refused(source)


@pytest.mark.parametrize("family", ["granitemoe", "jetmoe", "dbrx", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("shape", [(), (0,), (0, 0, 0)])
def test_experts_of_no_tensor(tmp_path, tiny, refused, family, shape):
    source = tiny.save(family, tmp_path / "source")
    tiny.save_tokenizer(source)
    names = [n for n in tiny.load_all(source) if "experts" in n or "linear.weight" in n]
    _tensors(source, lambda t: t.update({names[-1]: torch.zeros(shape)}))
    assert "config" in refused(source)


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("granitemoe", "num_local_experts"),
        ("jetmoe", "num_local_experts"),
        ("qwen3_moe", "moe_intermediate_size"),
        ("dbrx", "ffn_config"),
    ],
)
def test_no_experts_at_all(tmp_path, tiny, refused, family, setting):
    source = tiny.save(family, tmp_path / "source")
    tiny.save_tokenizer(source)
    none = {"ffn_hidden_size": 32, "moe_num_experts": 0, "moe_top_k": 2}
    _config(source, **{setting: none if setting == "ffn_config" else 0})
    assert "config" in refused(source)


def test_a_mixture_of_layouts(source, refused):
    fused = {"model.layers.1.mlp.experts.down_proj": torch.zeros(4, 64, 32)}
    _tensors(source, lambda t: t.update(fused))
    assert "is on disk in two layouts" in refused(source)


@pytest.mark.parametrize("name", [EXPERT, "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(source, refused, name, value):
    _tensors(source, lambda t: t[name].view(-1)[3:4].fill_(value))
    assert "1 of 2048 values are NaN or Inf" in refused(source) or name != EXPERT
    shutil.rmtree(source.parent / "out.partial", ignore_errors=True)
    assert "NaN or Inf" in refused(source)


def test_a_text_shorter_than_one_window(source, refused):
    assert "window" in refused(source, words=8)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "option", ["--delta", "--bits", "--dense-bits", "--model-bits", "--unseen"]
)
def test_numbers_that_are_not_finite(source, refused, option, value):
    said = CliRunner().invoke(main, ["compress", str(source), str(source) + "-q", option, value])
    assert said.exit_code == 2, said.exception
    assert len(said.stderr.splitlines()) <= 4
    assert option.strip("-").replace("-", "_") in said.stderr.replace("-", "_")


@pytest.mark.parametrize("delta", ["0", "-0.0", "-1", "-1e-30", "nan", "-inf"])
def test_a_step_that_is_not_positive(source, refused, delta):
    """A step of zero never ended, once."""
    message = refused(source, "--method", "rd", "--delta", delta)
    assert "delta" in message
    assert "give a" in message


@pytest.mark.parametrize("method", ["rtn", "gptq4", "qmoe"])
def test_own_words_belong_to_rd(source, refused, method):
    assert "--unseen belongs to --method rd" in refused(source, "--unseen", "2", "--method", method)


def test_an_encoder_decoder_says_no_words_of_its_own(tmp_path, tiny, refused):
    source = tiny.save("switch_transformers", tmp_path / "source")
    tiny.save_tokenizer(source)
    assert "leave it out" in refused(source, "--unseen", "2", "--method", "rd")


def test_names_that_no_file_can_have(source, refused, tmp_path):
    long = "x" * 300
    assert "File name too long" in refused(tmp_path / long)
    assert "File name too long" in refused(source, out=tmp_path / long)


def test_no_such_text(source, refused, tmp_path):
    message = refused(source, "--calib", str(tmp_path / "no.txt"))
    assert "no.txt" in message


def test_an_output_that_exists(source, refused, tmp_path):
    out = tmp_path / "there"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    assert "already exists; choose another output directory" in refused(source, out=out)
    assert (out / "mine.txt").read_text() == "keep"


def test_a_missing_shard(source, refused, tiny):
    tiny.to_shards(source, 3)
    (source / "model-00002-of-00003.safetensors").unlink()
    assert "the index names model-00002-of-00003.safetensors, which is missing" in refused(source)


def test_a_truncated_shard(source, refused, tiny):
    tiny.to_shards(source, 3)
    file = source / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model-00002-of-00003.safetensors" in refused(source)


UNUSABLE = ["[]", "3", "null", '{"cache_implementation": "x"}', '{"max_new_tokens": -3}']


@pytest.mark.parametrize("text", UNUSABLE)
def test_a_generation_config_with_which_no_model_loads(source, refused, text):
    """What transformers refuses is refused before any work, and not when the result is loaded."""
    (source / "generation_config.json").write_text(text)
    with pytest.raises((TypeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(source)
    assert "generation_config.json cannot be used" in refused(source)


@pytest.mark.parametrize("text", ["", "{", '{"temperature": 0.5, "do_sample": false}', '{"x": 1}'])
def test_a_generation_config_that_is_passed_over(source, text):
    (source / "generation_config.json").write_text(text)
    AutoModelForCausalLM.from_pretrained(source)
    check_generation(source)


def test_no_tokenizer(source, refused):
    for file in source.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer can be read" in refused(source)


def test_no_such_directory_and_no_config(refused, tmp_path):
    assert "does not exist" in refused(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(tmp_path / "empty")
