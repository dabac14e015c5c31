"""Low-precision tensors that the formats' own libraries wrote, read as those libraries read them.

tests/data/formats.safetensors holds, for every format, the stored tensors and under ``dense`` what
the library makes of them in bf16: compressed-tensors 0.20.0 (compress, decompress), ModelOpt
(NVFP4QTensor), AutoAWQ 0.2.9 (WQLinear_GEMM, dequantize_gemm in float32).
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmoe.errors import SourceError
from qmoe.source.checkpoint import open_checkpoint

VECTORS = Path(__file__).with_name("data") / "formats.safetensors"


def compressed_tensors(form, **weights):
    group = {"weights": {"symmetric": True, **weights}, "targets": ["Linear"]}
    method = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
    return {**method, "format": form, "config_groups": {"group_0": group}}


FP4 = {"num_bits": 4, "type": "float"}
FP8 = {"num_bits": 8, "type": "float"}
INT = {"type": "int"}
SETTINGS = {
    "modelopt NVFP4": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
    "compressed-tensors nvfp4-pack-quantized": compressed_tensors(
        "nvfp4-pack-quantized", **FP4, strategy="tensor_group", group_size=16
    ),
    "compressed-tensors mxfp4-pack-quantized": compressed_tensors(
        "mxfp4-pack-quantized", **FP4, strategy="group", group_size=32
    ),
    "compressed-tensors mxfp8-quantized": compressed_tensors(
        "mxfp8-quantized", **FP8, strategy="group", group_size=32
    ),
    "compressed-tensors int-quantized": compressed_tensors(
        "int-quantized", **INT, num_bits=8, strategy="channel"
    ),
    "compressed-tensors float-quantized": compressed_tensors(
        "float-quantized", **FP8, strategy="channel"
    ),
    "compressed-tensors pack-quantized": compressed_tensors(
        "pack-quantized", **INT, num_bits=4, strategy="group", group_size=32
    ),
    "AutoAWQ gemm": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
}


def stored(form):
    """Tensors of a format under the name of one Linear, and the dense matrix."""
    found = {k.rpartition("/")[2]: v for k, v in load_file(VECTORS).items() if k.startswith(form)}
    return {f"a.{k}": v for k, v in found.items() if k != "dense"}, found["dense"]


def write(directory, tensors, config):
    directory.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "toy", **config}))
    return directory


@pytest.mark.parametrize("form", SETTINGS)
def test_read_as_the_library_reads_it(tmp_path, form):
    tensors, dense = stored(form)
    aside = {f"a.{n}": torch.ones(1) for n in ("input_scale", "input_global_scale", "k_scale")}
    ck = open_checkpoint(
        write(tmp_path / "s", tensors | aside, {"quantization_config": SETTINGS[form]})
    )
    assert ck.names() == ["a.weight"]
    assert ck.shape("a.weight") == tuple(dense.shape)
    assert torch.equal(ck.read("a.weight"), dense)
    assert torch.equal(ck.read("a.weight", slice(1, 3)), dense[1:3])
    assert torch.equal(ck.read("a.weight", -1), dense[-1])


@pytest.mark.parametrize("form", SETTINGS)
def test_a_missing_or_wrong_part_is_named(tmp_path, form):
    tensors, _ = stored(form)
    for name, value in tensors.items():
        for change in ({}, {name: torch.cat([value, value]) if value.ndim else value.expand(2)}):
            rest = {k: v for k, v in tensors.items() if k != name} | change
            d = write(tmp_path / "s", rest, {"quantization_config": SETTINGS[form]})
            if change or name != "a.weight_scale" or form != "compressed-tensors int-quantized":
                with pytest.raises(SourceError, match=r"'a\.") as e:
                    open_checkpoint(d).read("a.weight")
                assert "\n" not in str(e.value)


def test_modelopt_stacks_of_experts(tmp_path):
    """Llama 4 and gpt-oss: matrices [E, in, out], quantized transposed (unified_export_hf.py)."""
    tensors, dense = stored("modelopt NVFP4")
    packed, scale, whole = (tensors[f"a.weight{p}"] for p in ("", "_scale", "_scale_2"))
    two = {
        "e.gate_up_proj": torch.stack([packed.T, packed.flip(0).T]),
        "e.gate_up_proj_weight_scale": torch.stack(
            [s.view(torch.uint8).T for s in (scale, scale.view(torch.uint8).flip(0))]
        ).view(scale.dtype),
        "e.gate_up_proj_weight_scale_2": whole,
        "e.gate_up_proj_input_scale": torch.ones(()),
    }
    settings = {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    d = write(tmp_path / "s", two, {})
    (d / "hf_quant_config.json").write_text(json.dumps(settings))  # as older exports say it
    ck = open_checkpoint(d)
    assert (ck.names(), ck.quantization) == (["e.gate_up_proj"], "nvfp4")
    assert torch.equal(ck.read("e.gate_up_proj"), torch.stack([dense.T, dense.flip(0).T]))
    assert torch.equal(ck.read("e.gate_up_proj", slice(1, 2))[0], dense.flip(0).T)


def test_settings_in_files_of_their_own(tmp_path):
    tensors, dense = stored("AutoAWQ gemm")
    d = write(tmp_path / "s", tensors, {})
    settings = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    (d / "quant_config.json").write_text(json.dumps(settings))
    assert torch.equal(open_checkpoint(d).read("a.weight"), dense)
    d = write(tmp_path / "s", {"a.weight": dense}, {})  # left beside a dense checkpoint
    ck = open_checkpoint(d)
    assert (ck.quantization, ck.settings) == (None, None)
    assert torch.equal(ck.read("a.weight"), dense)


def test_settings_of_any_part_of_a_model(tmp_path):
    tensors, dense = stored("modelopt NVFP4")
    inner = {"quantization_config": SETTINGS["modelopt NVFP4"], "hidden_size": 64}
    d = write(tmp_path / "s", tensors, {"thinker_config": {"text_config": inner}})
    ck = open_checkpoint(d)
    assert torch.equal(ck.read("a.weight"), dense)
    assert ck.config["thinker_config"] == {"text_config": {"hidden_size": 64}}
    other = {"quantization_config": SETTINGS["AutoAWQ gemm"]}
    d = write(tmp_path / "s", tensors, {"thinker_config": inner, "talker_config": other})
    with pytest.raises(SourceError, match=r"thinker_config.* and .*talker_config.* differ"):
        open_checkpoint(d)


def test_blocks_of_128_where_no_size_is_stated(tmp_path, tiny):
    """transformers' own default; one number or one per row is what its shape says."""
    q, s = tiny.encoders.fp8_encode(torch.randn(200, 260), (128, 128))
    tensors = {"a.weight": q, "a.weight_scale_inv": s, "b.weight": q.clone()}
    tensors |= {"b.weight_scale": torch.tensor(0.5), "c.weight": q.clone()}
    tensors["c.weight_scale"] = torch.rand(200, 1)
    d = write(tmp_path / "s", tensors, {"quantization_config": {"quant_method": "fp8"}})
    ck = open_checkpoint(d)
    assert torch.equal(ck.read("a.weight"), tiny.encoders.fp8_decode(q, s, (128, 128)))
    assert torch.equal(ck.read("b.weight"), (q.float() * 0.5).bfloat16())
    rows = (q.float() * tensors["c.weight_scale"]).bfloat16()
    assert torch.equal(ck.read("c.weight", slice(3, 9)), rows[3:9])


def test_experts_of_four_bits_in_an_fp8_model(tmp_path):
    """DeepSeek-V4: fp8 in blocks, and experts as bytes of two 4-bit floats with scales e8m0."""
    tensors, dense = stored("compressed-tensors mxfp4-pack-quantized")
    scale = tensors["a.weight_scale"].view(torch.float8_e8m0fnu)
    both = {"a.weight": tensors["a.weight_packed"].view(torch.int8), "a.scale": scale}
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"}
    d = write(tmp_path / "s", both, {"quantization_config": settings})
    assert torch.equal(open_checkpoint(d).read("a.weight"), dense)


def refusals():
    pack, awq = SETTINGS["compressed-tensors pack-quantized"], SETTINGS["AutoAWQ gemm"]
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    nvfp4 = SETTINGS["modelopt NVFP4"]
    for method in (  # every other method that transformers 5.23 knows
        *("aqlm", "auto-round", "bitnet", "bitsandbytes", "eetq", "fouroversix", "fp_quant"),
        *("gemma", "gguf", "higgs", "hqq", "metal", "nvfp4", "quanto", "quark", "sinq", "spqr"),
        *("torchao", "vptq", "exl3", "exl2"),
    ):
        yield {"quant_method": method}, f"quantization method '{method}' of the source is not supp"
    yield {"load_in_4bit": True, "_load_in_4bit": True}, "method 'bitsandbytes'"
    yield {"group_size": 64, "bits": 4, "mode": "affine"}, "MLX"
    yield {**awq, "version": "GEMV"}, "version='gemv'"
    yield {**awq, "backend": "llm-awq"}, "version='llm-awq'"
    yield {**awq, "bits": 8}, "AWQ with bits=8"
    yield {**awq, "zero_point": False}, "zero_point=False"
    yield {**gptq, "format": "gptq_marlin"}, "checkpoint_format='gptq_marlin'"
    yield {**gptq, "is_marlin_format": True}, "checkpoint_format='marlin'"
    yield {**gptq, "dynamic": {"+:.*down": {"bits": 8}}}, "other settings for"
    yield {**gptq, "rotation": "hadamard"}, "rotation=hadamard changes what the stored weights"
    yield {**pack, "transform_config": {"config_groups": {"R1": {}}}}, "transform_config="
    yield {**pack, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format="
    yield compressed_tensors("pack-quantized", **INT, num_bits=4, symmetric=False), "symmetric"
    yield compressed_tensors("dense", **INT, num_bits=8), "format 'dense' with weights"
    yield compressed_tensors("mxfp6-pack-quantized", type="float", num_bits=6), "mxfp6-pack"
    yield {**nvfp4, "quant_algo": "NVFP4_AWQ"}, "quant_algo='NVFP4_AWQ'"
    yield {**nvfp4, "quant_algo": "W4A8_AWQ"}, "quant_algo='W4A8_AWQ'"
    yield {**nvfp4, "quant_algo": None}, "quant_algo=None"
    yield {"quant_method": "fp8", "expert_dtype": "int3"}, "expert_dtype='int3'"


@pytest.mark.parametrize(("settings", "words"), list(refusals()))
def test_settings_that_are_not_read_are_named(tmp_path, settings, words):
    d = write(tmp_path / "s", {"a.weight": torch.ones(4, 4)}, {"quantization_config": settings})
    with pytest.raises(SourceError, match=words.replace("(", r"\(")) as e:
        open_checkpoint(d)
    assert "\n" not in str(e.value)


def test_gptq_v2_under_its_newer_name(tmp_path, tiny):
    parts, dense = tiny.encoders.gptq_encode(torch.randn(16, 64), 32, 4, version=2)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "format": "gptq_v2"}
    tensors = {f"a.{k}": v for k, v in parts.items()}
    d = write(tmp_path / "s", tensors, {"quantization_config": settings})
    assert torch.equal(open_checkpoint(d).read("a.weight"), dense)


def test_mlx(tmp_path):
    words = {"a.weight": torch.ones(4, 4, dtype=torch.uint8), "a.scales": torch.ones(4, 1)}
    d = write(tmp_path / "s", words, {"quantization": {"group_size": 64, "bits": 4}})
    with pytest.raises(SourceError, match="MLX's own format"):
        open_checkpoint(d)


def test_a_scale_of_the_activations_in_the_weights(tmp_path):
    """ModelOpt's AWQ variants divide the weights by it: without it they are wrong."""
    tensors, _ = stored("modelopt NVFP4")
    tensors["a.pre_quant_scale"] = torch.ones(64)
    config = {"quantization_config": SETTINGS["modelopt NVFP4"]}
    with pytest.raises(SourceError, match=r"'a.pre_quant_scale' belongs to a quantized one"):
        open_checkpoint(write(tmp_path / "s", tensors, config))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["module.a.weight", "module.b.weight"], "begins with 'module'.*DistributedDataParallel"),
        (["_orig_mod.a.weight"], "begins with '_orig_mod'.*torch.compile"),
        (["base_model.model.a.weight"], "begins with 'base_model.model'.*PEFT"),
        (["a.0._orig_mod.weight", "b"], "a level '_orig_mod' of torch.compile"),
        (["a.q_proj.base_layer.weight", "b"], "a level 'base_layer' of a PEFT adapter"),
        (["a.lora_A.default.weight", "b"], "a level 'lora_A' of a LoRA adapter"),
    ],
)
def test_names_of_training_wrappers(tmp_path, names, words):
    d = write(tmp_path / "s", {n: torch.ones(2) for n in names}, {})
    with pytest.raises(SourceError, match=words):
        open_checkpoint(d)


def test_an_adapter_or_mistrals_own_weights(tmp_path):
    d = write(tmp_path / "s", {"a": torch.ones(2)}, {})
    whole = d / "model.safetensors"
    (d / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    (d / "adapter_model.safetensors").write_bytes(whole.read_bytes())
    with pytest.raises(SourceError, match=r"adapter of owner/base .* beside other weights"):
        open_checkpoint(d)
    whole.unlink()
    with pytest.raises(SourceError, match=r"adapter of owner/base .* alone: merge it into"):
        open_checkpoint(d)
    (d / "config.json").unlink()
    with pytest.raises(SourceError, match=r"adapter of owner/base .* alone: merge it into"):
        open_checkpoint(d)
    (d / "adapter_config.json").unlink()
    (d / "adapter_model.safetensors").rename(d / "consolidated.safetensors")
    (d / "params.json").write_text("{}")
    with pytest.raises(SourceError, match=r"holds consolidated.safetensors, weights under Mistral"):
        open_checkpoint(d)
