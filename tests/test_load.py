"""Compressed checkpoints as transformers models: equal to the dense model that holds the decoded
weights."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from container_parts import reseal
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import qmoe
from qmoe.errors import CorruptError, OutputError, QmoeError
from qmoe.inference import on_cpu
from qmoe.inference.cache import CACHE_VARIABLE
from qmoe.inference.experts import BACKENDS, EncodedExperts
from qmoe.inference.load import set_cache_bytes
from qmoe.models.families import find as layouts
from qmoe.models.projects.fairseq_moe import FairseqMoeConfig
from qmoe.models.projects.megatron_moe import MegatronMoeConfig
from qmoe.models.projects.openmoe import OpenMoeConfig


def _auto(model):
    return AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM


@torch.no_grad()
def _logits(model, inputs):
    return model(**inputs, use_cache=False).logits


def _close(got, expected):
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_every_family_loads_saves_and_loads(
    family, build_model, model_inputs, write_compressed, tmp_path
):
    dense = write_compressed(build_model(family), tmp_path / "a")
    layouts.repair(dense)
    inputs = model_inputs(dense)
    expected = _logits(dense, inputs)
    model, info = _auto(dense).from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert any(isinstance(m, EncodedExperts) for m in model.modules())
    _close(_logits(model, inputs), expected)
    model.save_pretrained(tmp_path / "b")
    _close(_logits(qmoe.load(tmp_path / "b"), inputs), expected)
    out = model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape[0] == 2


OWN = {
    OpenMoeConfig: {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "num_experts": 4,
        "moe_layer_interval": 2,
    },
    FairseqMoeConfig: {
        "d_model": 64,
        "ffn_dim": 96,
        "num_layers": 2,
        "attention_heads": 4,
        "num_experts": 4,
        "sparse_layers": [1],
    },
    MegatronMoeConfig: {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "num_experts": 4,
        "sparse_layers": [1],
    },
}


@pytest.mark.parametrize("config_class", OWN)
def test_own_model_classes(config_class, model_inputs, write_compressed, tmp_path):
    config = config_class(vocab_size=128, **OWN[config_class])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.08)
    dense = write_compressed(model, tmp_path / "a")
    inputs = model_inputs(dense)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    _close(_logits(loaded, inputs), _logits(dense, inputs))
    loaded.save_pretrained(tmp_path / "b")
    _close(_logits(qmoe.load(tmp_path / "b"), inputs), _logits(dense, inputs))


def test_saved_again_is_the_same_bytes(compressed, tmp_path):
    out, _ = compressed
    qmoe.load(out).save_pretrained(tmp_path / "again")
    for path in (*out.glob("*.safetensors*"), out / "config.json"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_saving_beside_a_tokenizer_and_twice(compressed, model_inputs, tmp_path):
    out, dense = compressed
    target = tmp_path / "t"
    target.mkdir()
    (target / "tokenizer.json").write_text("{}")
    for _ in range(2):
        qmoe.load(out).save_pretrained(target, max_shard_size="20KB")
    assert (target / "tokenizer.json").read_text() == "{}"
    _close(_logits(qmoe.load(target), model_inputs(dense)), _logits(dense, model_inputs(dense)))
    assert not (tmp_path / "t.partial").exists()


def test_saving_over_its_source_or_with_foreign_arguments(compressed, tmp_path):
    out, _ = compressed
    model = qmoe.load(out)
    with pytest.raises(OutputError, match="what the model was loaded from"):
        model.save_pretrained(out)
    with pytest.raises(OutputError, match="hf upload"):
        model.save_pretrained(tmp_path / "x", push_to_hub=True)
    with pytest.raises(OutputError, match="write it like 4GB"):
        model.save_pretrained(tmp_path / "x", max_shard_size="lots")
    model.save_pretrained(tmp_path / "x", is_main_process=False)
    assert not (tmp_path / "x").exists()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(compressed, model_inputs, dtype):
    out, dense = compressed
    model = qmoe.load(out, dtype=dtype)
    assert model.model.embed_tokens.weight.dtype == dtype
    assert model.model.layers[0].mlp.experts.stream.dtype == torch.uint8
    assert _logits(model, model_inputs(dense)).dtype == dtype
    host, module = (m.model.layers[0].mlp.experts for m in (dense, model))
    for n in (4, 40):  # products that decode as they go, and dense ones
        x, weights = torch.randn(n, 64), torch.rand(n, 2)
        index = torch.tensor([[0, 1], [2, 3]]).repeat(n // 2, 1)
        expected = host(x, index, weights)
        got = module(x.to(dtype), index, weights.to(dtype))
        assert got.dtype == dtype
        tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
        assert (got.float() - expected).abs().max() <= tolerance * expected.abs().max()


def test_device_map_auto(compressed, model_inputs):
    out, dense = compressed
    model = qmoe.load(out, device_map="auto", dtype=torch.float32)
    _close(_logits(model, model_inputs(dense)), _logits(dense, model_inputs(dense)))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nllb-moe", "jamba", "switch_transformers"])
def test_disk_offload(name, build_model, model_inputs, write_compressed, tmp_path):
    dense = write_compressed(build_model(name), tmp_path / "a")
    layouts.repair(dense)
    inputs = model_inputs(dense)
    places = {}
    for path, module in dense.named_modules():
        if not list(module.children()) and list(module.parameters(recurse=False)):
            places[path] = "cpu"
    for path, m in dense.named_modules():
        if type(m).__name__ in dense._no_split_modules:
            places = {k: v for k, v in places.items() if not k.startswith(path + ".")}
            places[path] = "disk" if path.endswith(".1") else "cpu"
    model = _auto(dense).from_pretrained(
        tmp_path / "a", device_map=places, offload_folder=str(tmp_path / "off")
    )
    on_meta = [n for n, p in model.named_parameters() if p.is_meta]
    assert any(n.endswith(".stream") for n in on_meta)
    for _ in range(2):
        _close(_logits(model, inputs), _logits(dense, inputs))
    away = [m for m in model.modules() if isinstance(m, EncodedExperts) and m.stream.is_meta]
    assert away
    for module in away:  # nothing refers to streams that are only lent
        assert module.offloaded
        assert module._checked is None
        assert not [k for k in module.caches.parsed._items if k[0] == module.layout.path]
    model.save_pretrained(tmp_path / "b")
    _close(_logits(qmoe.load(tmp_path / "b"), inputs), _logits(dense, inputs))


@pytest.mark.parametrize("size", [0, 1, 40_000, 1 << 30])
def test_cache_sizes(compressed, model_inputs, size):
    out, dense = compressed
    model = qmoe.load(out, cache_bytes=size)
    inputs = model_inputs(dense)
    for _ in range(2):
        _close(_logits(model, inputs), _logits(dense, inputs))
    cache = model.model.layers[0].mlp.experts.caches.decoded
    assert cache.used <= size
    assert (cache.used > 0) == (size >= 96 * 64 * 4)


def test_cache_from_the_environment(compressed, monkeypatch):
    out, _ = compressed
    monkeypatch.setenv(CACHE_VARIABLE, "12345")
    assert qmoe.load(out).model.layers[0].mlp.experts.caches.decoded.capacity == 12345
    monkeypatch.setenv(CACHE_VARIABLE, "much")
    with pytest.raises(QmoeError, match="number of bytes"):
        qmoe.load(out)


@torch.no_grad()
def test_few_and_many_rows_agree_and_repeat(compressed):
    out, dense = compressed
    module = qmoe.load(out).model.layers[1].mlp.experts
    host = dense.model.layers[1].mlp.experts
    g = torch.Generator().manual_seed(0)
    for n in (0, 1, 2, 4, 8, 9, 40, 300):
        x = torch.randn(n, 64, generator=g)
        index = torch.randint(0, 4, (n, 2), generator=g)
        index[:, 1] = (index[:, 0] + 1) % 4
        weights = torch.rand(n, 2, generator=g)
        y = module(x, index, weights)
        torch.testing.assert_close(y, host(x, index, weights), rtol=1e-4, atol=1e-5)
        assert torch.equal(y, module(x, index, weights))


@torch.no_grad()
def test_one_token_is_that_token_of_many(compressed):
    out, _ = compressed
    module = qmoe.load(out).model.layers[1].mlp.experts
    g = torch.Generator().manual_seed(1)
    x = torch.randn(6, 64, generator=g)
    # in any order of experts, one left out, one chosen twice
    index = torch.tensor([[3, 0], [0, 3], [2, 4], [1, 1], [4, 4], [1, 2]])
    weights = torch.rand(6, 2, generator=g)
    for dtype in (torch.float32, torch.bfloat16):
        for w in (weights.to(dtype), None):
            alone = [
                on_cpu.run_on_cpu(
                    module,
                    x[i : i + 1].to(dtype),
                    index[i : i + 1],
                    None if w is None else w[i, None],
                )
                for i in range(6)
            ]
            together = on_cpu.run_on_cpu(module, x.to(dtype), index, w)
            torch.testing.assert_close(torch.cat(alone), together, rtol=1e-5, atol=1e-6)
            assert not alone[4].any()


@pytest.mark.parametrize("tokens", [1, 2])
def test_gradients_reach_the_input(compressed, tokens):
    out, dense = compressed
    grads = []
    for model in (qmoe.load(out), dense):
        x = torch.linspace(-1, 1, tokens * 64).reshape(tokens, 64).requires_grad_()
        index = torch.tensor([[0, 1], [2, 3]])[:tokens]
        share = torch.full((tokens, 2), 0.5)
        model.model.layers[0].mlp.experts(x, index, share).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_new_weights_void_the_cache(
    compressed, write_compressed, build_model, model_inputs, tmp_path
):
    out, dense = compressed
    other = write_compressed(build_model("mixtral", seed=3), tmp_path / "o")
    model = qmoe.load(out, cache_bytes=1 << 30)
    inputs = model_inputs(dense)
    _logits(model, inputs)
    replacement = qmoe.load(tmp_path / "o").state_dict()
    for module, shapes in ((m, m.layout) for m in model.modules() if isinstance(m, EncodedExperts)):
        stream = replacement[f"{shapes.path}.stream"]
        module.stream = torch.nn.Parameter(torch.empty_like(stream), requires_grad=False)
    model.load_state_dict(replacement)
    _close(_logits(model, inputs), _logits(other, inputs))


def test_a_registered_backend_gets_the_work(compressed, monkeypatch):
    out, _ = compressed
    model = qmoe.load(out)
    calls = []

    def backend(module, hidden, index, weights):
        calls.append((hidden.shape, index.shape, weights.shape))
        return on_cpu.run_on_cpu(module, hidden, index, weights)

    monkeypatch.setitem(BACKENDS, "cpu", backend)
    model(torch.tensor([[5, 6, 7]]))
    assert calls == [((3, 64), (3, 2), (3, 2))] * model.config.num_hidden_layers


def test_import_alone_registers_and_compiles_nothing(compressed):
    out, _ = compressed
    code = f"""
import qmoe, torch
from transformers import AutoModelForCausalLM
m = AutoModelForCausalLM.from_pretrained({str(out)!r})
print(type(m.model.layers[0].mlp.experts).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "EncodedExperts", done.stderr


def test_forgetting_the_import_is_an_error(compressed):
    out, _ = compressed
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(out)!r})"
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode != 0
    assert "no file named model.safetensors" in done.stderr


def test_the_model_class_itself_loads_and_checks(compressed, tmp_path):
    from transformers import MixtralForCausalLM

    out, _ = compressed
    MixtralForCausalLM.from_pretrained(out)
    bad = tmp_path / "bad"
    shutil.copytree(out, bad)
    (bad / "tokenizer_config.json").write_text("{ \n")
    with pytest.raises(CorruptError, match=r"tokenizer_config\.json is corrupt: sha256"):
        MixtralForCausalLM.from_pretrained(bad)


def test_deepcopy_runs_by_itself(compressed, model_inputs):
    import copy

    out, dense = compressed
    model = qmoe.load(out, cache_bytes=1 << 20)
    inputs = model_inputs(dense)
    expected = _logits(model, inputs)
    twin = copy.deepcopy(model)
    set_cache_bytes(twin, 0)
    del model
    _close(_logits(twin, inputs), expected)


def test_no_such_directory(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(QmoeError, match="is no directory and cannot be fetched"):
        qmoe.load("nobody/nothing")


def test_a_kind_of_experts_that_the_model_has_not_is_refused(compressed, tmp_path):
    out = tmp_path / "other"
    shutil.copytree(compressed[0], out)
    config = json.loads((out / "config.json").read_text())
    for module in config["quantization_config"]["modules"].values():
        module["kind"] = "?"
    (out / "config.json").write_text(json.dumps(config))
    reseal(out)
    with pytest.raises(CorruptError, match=r"the model has .*kind='fused'"):
        qmoe.load(out)
