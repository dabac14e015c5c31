"""Streaming a checkpoint block by block gives the model that from_pretrained gives."""

import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qmoe.calib.activations import ActivationStore
from qmoe.calib.outputs import Resident
from qmoe.calib.routing import park, plugged
from qmoe.calib.walk import Walk
from qmoe.errors import NonFiniteError, QmoeError, SourceError, UnsupportedModelError
from qmoe.models.families.find import expert_forward
from qmoe.models.streamed import StreamedModel
from qmoe.source.checkpoint import open_checkpoint

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "tiny-mixtral"
WRITTEN_FOR = "5.23"  # the transformers release that models/streamed.py was read from


def _tiny(tmp_path, kind, **config):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **config)
    auto = (
        transformers.AutoModelForSeq2SeqLM
        if config.is_encoder_decoder
        else transformers.AutoModelForCausalLM
    )
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.08)
    model.save_pretrained(tmp_path / kind)
    return tmp_path / kind


MIXTRAL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
LLAMA = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4}
SWITCH = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_heads": 4,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "num_experts": 4,
    "expert_capacity": 64,
    "decoder_start_token_id": 0,
}


@pytest.mark.parametrize(
    "name",
    ["_move_missing_keys_from_meta_to_device", "_initialize_missing_keys", "_get_dtype_plan"],
)
def test_private_api_of_transformers_is_where_it_was(name):
    assert hasattr(transformers.PreTrainedModel, name), f"written for transformers {WRITTEN_FOR}"


def _stream(directory, batches):
    """Every block with its experts read one at a time, outputs plugged back in: the whole
    machinery, no quantizer.
    """
    streamed = StreamedModel(open_checkpoint(str(directory)))
    streamed.load_rest()
    with ActivationStore(1000) as store:
        walk = Walk(streamed, batches, Resident(store))
        reads = []
        for block in streamed.blocks():
            streamed.load_block(block, streamed.encoded_names(block))
            with ExitStack() as stack:
                for layout, module in streamed.experts_of(block):
                    parked = park(
                        walk, block, layout.path, module, layout.projections[-1].rows, store
                    )
                    for e in range(layout.experts):
                        weights = streamed.read_expert(layout, module, e)
                        reads.append((layout.path, e))
                        token, slot = parked.slots(e)
                        y = expert_forward(module, weights, e, parked.hidden[token])
                        parked.output[token, slot] = y * parked.weight[token, slot, None]
                    stack.enter_context(plugged(walk, module, parked))
                walk.run(block)
            streamed.free(block)
            left = [n for n, p in block.module.named_parameters() if not p.is_meta]
            assert left == []
        assert store.spilled > 0
        assert len(reads) == len(set(reads))
        return streamed, list(walk.logits())


@pytest.mark.parametrize(
    ("kind", "config"), [("mixtral", MIXTRAL), ("switch_transformers", SWITCH)]
)
def test_streamed_logits_are_the_models(tmp_path, kind, config):
    directory = _tiny(tmp_path, kind, **config)
    torch.manual_seed(1)
    batches = [{"input_ids": torch.randint(3, 90, (2, 12))} for _ in range(3)]
    if kind == "switch_transformers":
        for b in batches:
            b["decoder_input_ids"] = torch.randint(3, 90, (2, 7))
    streamed, logits = _stream(directory, batches)
    full = type(streamed.model).from_pretrained(directory).eval()
    with torch.no_grad():
        for batch, got in zip(batches, logits, strict=True):
            want = full(**batch, use_cache=False).logits
            assert (want - got).abs().max() < 1e-5 * want.abs().max()


def test_dense_tensors_keep_their_disk_dtype_and_leave_out_experts():
    streamed = StreamedModel(open_checkpoint(str(EXAMPLE)))
    block = next(streamed.blocks())
    names = streamed.encoded_names(block)
    streamed.load_block(block, names)
    dense = dict(streamed.dense(lambda n: n.startswith(f"{block.name}.") and n not in names))
    assert {t.dtype for t in dense.values()} == {torch.bfloat16}
    assert not any("experts" in n for n in dense)
    assert f"{block.name}.mlp.gate.weight" in dense


@pytest.mark.parametrize("before", [None, "0"])
def test_no_thread_of_transformers_outlives_an_interrupted_load(monkeypatch, before):
    def refuse(*_, **__):
        raise AssertionError("a thread that nobody waits for")

    name = "HF_DEACTIVATE_ASYNC_LOAD"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    monkeypatch.setattr(transformers.core_model_loading, "ThreadPoolExecutor", refuse)
    streamed = StreamedModel(open_checkpoint(str(EXAMPLE)))
    streamed.load_rest()
    streamed.load_block(next(streamed.blocks()))
    assert os.environ.get(name) == before


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(EXAMPLE, tmp_path / "m")
    return tmp_path / "m"


def _edit(directory, change):
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def test_unknown_model_type_is_refused(copy):
    _edit(copy, lambda c: c.update(model_type="no_such_model"))
    with pytest.raises(UnsupportedModelError, match="no_such_model"):
        StreamedModel(open_checkpoint(str(copy)))


def test_model_without_experts_is_refused(tmp_path):
    directory = _tiny(tmp_path, "llama", **LLAMA)
    with pytest.raises(UnsupportedModelError, match="no mixture-of-experts"):
        StreamedModel(open_checkpoint(str(directory)))


def test_config_that_disagrees_with_the_tensors_is_refused(copy):
    _edit(copy, lambda c: c.update(num_key_value_heads=4))
    with pytest.raises(SourceError, match="does not match"):
        StreamedModel(open_checkpoint(str(copy)))


def test_missing_tensor_is_named(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"layers\.1\.self_attn\.q_proj"):
        StreamedModel(open_checkpoint(str(copy)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_expert_is_named(copy, bad):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.block_sparse_moe.experts.3.w2.weight"][5, 7] = bad
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    streamed = StreamedModel(open_checkpoint(str(copy)))
    layout, module = streamed.experts[0]
    streamed.read_expert(layout, module, 2)
    with pytest.raises(NonFiniteError, match=r"experts\.3\.w2"):
        streamed.read_expert(layout, module, 3)


def test_every_error_is_a_qmoe_error():
    assert all(
        issubclass(e, QmoeError) for e in (NonFiniteError, SourceError, UnsupportedModelError)
    )
