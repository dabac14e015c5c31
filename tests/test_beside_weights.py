"""What lies around and beside the weights of a checkpoint: links, settings, templates, other files,
tensors that no module takes. Always as transformers reads the same directory.
"""

import json
import shutil

import pytest
import torch
from checkpoints import compressed, edit, exported, same, source_of
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import qmoe
from qmoe.calib.text import windows
from qmoe.measure.score import evaluate
from qmoe.publish.export import export

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture
def source(tmp_path, tiny):
    source_of(tiny, tmp_path / "source", "mixtral")
    return tmp_path / "source"


def _mixtral():
    from transformers import MixtralForCausalLM

    return MixtralForCausalLM


def test_a_snapshot_of_links_as_the_hubs_cache_has_it(source, tmp_path, tiny):
    """Every file is a link to a blob that is named by its hash and has no ending."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    tiny.to_shards(source, 2)
    for i, file in enumerate(source.iterdir()):
        shutil.copy(file, blobs / f"{i:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:040x}")
    same(snapshot, _mixtral())
    link = tmp_path / "ein Verzeichnis mit Ümlaut [1]"
    link.symlink_to(snapshot)
    compressed(tiny, link, tmp_path / "q")
    assert not any(p.is_symlink() for p in (tmp_path / "q").iterdir())
    score = evaluate(str(tmp_path / "q"), str(tmp_path / "text.txt"), str(link), ctx=24, tokens=96)
    assert score.kl is not None


def _in_file(source):
    (source / "chat_template.jinja").write_text(TEMPLATE)


def _in_json(source):
    (source / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))


def _in_list(source):
    named = [{"name": n, "template": TEMPLATE + n} for n in ("default", "tools")]
    file = source / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": named}))


def _in_folder(source):
    (source / "additional_chat_templates").mkdir()
    for name in ("tools", "rag"):
        file = source / "additional_chat_templates" / f"{name}.jinja"
        file.write_text(TEMPLATE + name)


def _in_folder_and_file(source):
    _in_list(source)  # which the files replace
    _in_folder(source)
    _in_file(source)


@pytest.mark.parametrize(
    "put", [_in_file, _in_json, _in_list, _in_folder, _in_folder_and_file], ids=lambda f: f.__name__
)
def test_chat_templates_wherever_they_are(source, tmp_path, tiny, put):
    put(source)
    before = AutoTokenizer.from_pretrained(source)
    compressed(tiny, source, tmp_path / "q")
    export(tmp_path / "q", tmp_path / "dense")
    for folder in ("q", "dense"):
        after = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert after.chat_template == before.chat_template
        assert after.get_vocab() == before.get_vocab()
        assert after.special_tokens_map == before.special_tokens_map


def test_a_tokenizer_that_cuts_and_pads_does_not_do_so_to_the_text(source, tmp_path, tiny):
    text = tiny.save_text(tmp_path / "text.txt", 400)
    plain = windows(AutoTokenizer.from_pretrained(source), text, 96, 24)
    file = source / "tokenizer.json"
    cuts = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    pads = {
        **{"strategy": {"Fixed": 8}, "direction": "Left", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"},
    }
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"truncation": cuts, "padding": pads})
    )
    config = source / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 8}))
    assert torch.equal(windows(AutoTokenizer.from_pretrained(source), text, 96, 24), plain)


@pytest.mark.parametrize(
    "values",
    [
        {"rope_theta": 5e4, "rope_parameters": None},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
        {"num_experts": 4, "num_local_experts": None},
        {"architectures": None},
        {"architectures": "MixtralForCausalLM"},
        {"torch_dtype": "float32", "dtype": None},
        {"transformers_version": "99.0"},
        {"tie_word_embeddings": None},
        {"num_hidden_layers": 2},
        {"auto_map": {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "configuration_x.C"}},
    ],
    ids=lambda values: next(iter(values)),
)
def test_settings_of_other_times_and_hands(source, tmp_path, tiny, values):
    """None removes a setting. Fewer layers than are stored are a model of fewer layers."""
    file = source / "config.json"
    config = json.loads(file.read_text())
    for name, value in values.items():
        config.pop(name, None)
        if value is not None:
            config[name] = value
    file.write_text(json.dumps(config))
    same(source, _mixtral())
    compressed(tiny, source, tmp_path / "q")
    loaded = qmoe.load(tmp_path / "q")
    assert loaded.dtype == torch.float32
    assert len(loaded.model.layers) == values.get("num_hidden_layers", 3)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "mlx"}, {"format": "np"}, {"a": "b"}])
def test_metadata_of_safetensors(source, metadata):
    tensors = {k: v.clone() for k, v in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata)
    same(source, _mixtral())


def test_tensors_that_no_module_takes_come_along(source, tmp_path, tiny):
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "score.weight": torch.ones(2, 64),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "flag": torch.tensor(True),
    }
    tensors = {k: v.clone() for k, v in load_file(source / "model.safetensors").items()}
    save_file(tensors | more, source / "model.safetensors", {"format": "pt"})
    same(source, _mixtral())
    compressed(tiny, source, tmp_path / "q")
    stored = exported(tmp_path / "q")
    for name, tensor in more.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(stored[name], tensor)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("experts", [1, 3])
def test_few_and_narrow_experts(tmp_path, tiny, experts, width):
    sizes = {"num_local_experts": experts, "num_experts_per_tok": 1, "intermediate_size": width}
    cls = source_of(tiny, tmp_path / "source", "mixtral", **sizes)
    same(tmp_path / "source", cls)
    compressed(tiny, tmp_path / "source", tmp_path / "q", "rd", delta=1.0)
    assert qmoe.load(tmp_path / "q")


def test_more_rows_than_the_tokenizer_has_tokens(tmp_path, tiny):
    """Embeddings padded to a round number; a number that is not theirs is refused."""
    source = tmp_path / "source"
    cls = source_of(tiny, source, "mixtral", vocab_size=200)
    same(source, cls)
    compressed(tiny, source, tmp_path / "q")
    assert qmoe.load(tmp_path / "q").get_input_embeddings().weight.shape[0] == 200
    for rows in (100, 300):
        edit(source, vocab_size=rows)
        with pytest.raises(qmoe.SourceError, match=r"config\.json asks for"):
            compressed(tiny, source, tmp_path / f"r{rows}")


@pytest.mark.parametrize("stated", [None, 3, "int8", "float8_e4m3fn", "half", {"": "bfloat16"}])
def test_a_dtype_in_which_no_model_can_be(tmp_path, tiny, stated):
    """The tensors' own takes its place, as a quantizer may have written that of its words."""
    source = tmp_path / "source"
    source_of(tiny, source, "mixtral", torch.bfloat16)
    edit(source, dtype=stated)
    compressed(tiny, source, tmp_path / "q")
    dtype = torch.float16 if stated == "half" else torch.bfloat16
    assert qmoe.load(tmp_path / "q").dtype == dtype
    export(tmp_path / "q", tmp_path / "dense")
    assert _mixtral().from_pretrained(tmp_path / "dense").dtype == torch.bfloat16
