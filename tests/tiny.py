"""Tiny random models of every family, written as their publishers write them; and rewritten in
low-precision source formats.

Tests take it from the fixture `tiny` (conftest.py).
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encoders
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
)

BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
NARROW = {"intermediate_size": 32}  # where it is the experts' width
HEAD = {"head_dim": 16}
TOP2 = {"num_experts_per_tok": 2}
QWEN = {"num_experts": 4, "moe_intermediate_size": 32, **TOP2}
LOCAL = {"num_local_experts": 4, **TOP2}
SHARED = {"moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1, **TOP2}

CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {**BASE, **LOCAL},
    "qwen2_moe": {**BASE, **QWEN, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {**BASE, **QWEN, **HEAD, "decoder_sparse_step": 1},
    "qwen3_next": {
        **BASE,
        **QWEN,
        **HEAD,
        "shared_expert_intermediate_size": 48,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_hidden_layers": 4,
    },
    "olmoe": {**BASE, **NARROW, **TOP2, "num_experts": 4},
    "deepseek_v2": {**BASE, **MLA, **SHARED, "n_routed_experts": 4, "n_group": 2, "topk_group": 1},
    "deepseek_v3": {**BASE, **MLA, **SHARED, "n_routed_experts": 8, "n_group": 2, "topk_group": 1},
    "glm4_moe": {
        **BASE,
        **SHARED,
        **HEAD,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
    },
    "gpt_oss": {**BASE, **LOCAL, **HEAD, **NARROW, "sliding_window": 8},
    "granitemoe": {**BASE, **LOCAL, **NARROW},
    "phimoe": {**BASE, **LOCAL, **NARROW},
    "llama4_text": {
        **BASE,
        **HEAD,
        **NARROW,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 96,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 32,
    },
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 256,
        "vocab_size": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {
            "hidden_size": 64,
            "ffn_hidden_size": 32,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "jamba": {
        **BASE,
        **TOP2,
        "num_experts": 4,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
    "minimax": {**BASE, **LOCAL, **HEAD, **NARROW},
    "minimax_m2": {**BASE, **LOCAL, **HEAD, **NARROW, "rotary_dim": 16},
    "ernie4_5_moe": {
        **BASE,
        **HEAD,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "jetmoe": {**BASE, **LOCAL, **NARROW, "kv_channels": 16},
    "hunyuan_v1_moe": {**BASE, **HEAD, **NARROW, "num_experts": 4, "moe_topk": 2},
    "switch_transformers": {
        "vocab_size": 128,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 4,
        "num_decoder_layers": 4,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2,
        "num_heads": 4,
        "num_experts": 4,
        "expert_capacity": 64,
        "decoder_start_token_id": 0,
    },
    "nllb-moe": {
        "vocab_size": 128,
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "num_experts": 4,
        "expert_capacity": 64,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "max_position_embeddings": 256,
        "decoder_start_token_id": 2,
    },
}
FAMILIES = tuple(CONFIGS)
TITLES = {  # as people call them
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3_moe": "Qwen3-MoE",
    "qwen3_next": "Qwen3-Next",
    "olmoe": "OLMoE",
    "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3",
    "glm4_moe": "GLM-4.5-MoE",
    "gpt_oss": "gpt-oss",
    "granitemoe": "Granite-MoE",
    "phimoe": "Phi-3.5-MoE",
    "llama4_text": "Llama 4",
    "dbrx": "DBRX",
    "jamba": "Jamba",
    "minimax": "MiniMax",
    "minimax_m2": "MiniMax-M2",
    "ernie4_5_moe": "ERNIE-4.5-MoE",
    "jetmoe": "JetMoE",
    "hunyuan_v1_moe": "Hunyuan-A13B",
    "switch_transformers": "Switch Transformers",
    "nllb-moe": "NLLB-MoE",
}


def make(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A random model; deterministic, and no parameter is left at a constant where that would hide a
    mistake.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**CONFIGS[family], **changes})
    cls = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = cls.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                p.normal_(0, 0.08)
            elif "bias" in name or "sink" in name:
                p.normal_(0, 0.02)
        for name, b in model.named_buffers():
            if "correction_bias" in name:
                b.normal_(0, 0.02)
    return model


def save(family: str, directory: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a random model in the layout of its publisher (``save_pretrained`` reverts
    transformers' renames).
    """
    make(family, dtype, **changes).save_pretrained(directory)
    return directory


def load_all(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory of safetensors."""
    return {k: v for f in sorted(directory.glob("*.safetensors")) for k, v in load_file(f).items()}


def rewrite(directory: Path, tensors: dict[str, Tensor], quantization: dict | None = None) -> None:
    """Replace the weights of a one-file checkpoint, and set its ``quantization_config``."""
    for f in directory.glob("*.safetensors*"):
        f.unlink()
    whole = {k: v.contiguous().clone() for k, v in tensors.items()}
    save_file(whole, directory / "model.safetensors", {"format": "pt"})
    if quantization is not None:
        config = json.loads((directory / "config.json").read_text())
        config["quantization_config"] = quantization
        (directory / "config.json").write_text(json.dumps(config))


def to_shards(directory: Path, count: int, ending: str = "safetensors") -> None:
    """Split the weights over `count` files with an index; ``ending="bin"`` writes torch pickles."""
    tensors = load_all(directory)
    (directory / "model.safetensors").unlink()
    stem = "model" if ending == "safetensors" else "pytorch_model"
    where = {}
    for i in range(count):
        part = {k: tensors[k] for k in sorted(tensors)[i::count]}
        file = f"{stem}-{i + 1:05d}-of-{count:05d}.{ending}"
        where.update(dict.fromkeys(part, file))
        if ending == "bin":
            torch.save(part, directory / file)
        else:
            save_file(part, directory / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (directory / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


LINEARS = r"layers\.\d+\..*(_proj|_proj_with_mqa|_[ab]_proj|\.w[123])\.weight$"


def _convert(directory: Path, pattern: str, encode: Callable) -> tuple[dict, dict]:
    stored, dense = load_all(directory), {}
    for name in sorted(stored):
        dense[name] = stored[name]
        if re.search(pattern, name):
            new, dense[name] = encode(name, stored.pop(name))
            stored.update(new)
    return stored, dense


def to_fp8(directory: Path, block: tuple[int, int] = (16, 16), scale: str = "f32") -> dict:
    """Rewrite the blocks' linear layers as DeepSeek-V3 ships them; returns the dense tensors by
    name.

    `scale` is "f32", "e8m0" (F8_E8M0) or "u8" (the same as plain bytes).
    """

    def encode(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        q, s = encoders.fp8_encode(w, block, powers=scale != "f32")
        dense = encoders.fp8_decode(q, s, block)
        if scale != "f32":
            s = (torch.log2(s) + 127).to(torch.uint8)
            s = s.view(torch.float8_e8m0fnu) if scale == "e8m0" else s
        return {name: q, name + "_scale_inv": s}, dense

    stored, dense = _convert(directory, LINEARS, encode)
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    rewrite(directory, stored, {**settings, "weight_block_size": list(block)})
    return dense


def to_mxfp4(directory: Path) -> dict:
    """Rewrite gpt_oss's fused experts as published; returns the dense tensors by name."""

    def encode(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        blocks, scales = encoders.mxfp4_encode(w.transpose(1, 2))
        dense = encoders.mxfp4_decode(blocks, scales).transpose(1, 2)
        return {name + "_blocks": blocks, name + "_scales": scales}, dense

    stored, dense = _convert(directory, r"\.(gate_up|down)_proj$", encode)
    keep = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    rewrite(directory, stored, {"quant_method": "mxfp4", "modules_to_not_convert": keep})
    return dense


def to_int4(directory: Path, group: int = 32, pattern: str = r"experts\.\d+\..*weight$") -> dict:
    """Rewrite per-expert matrices as Kimi-K2 ships them; returns the dense tensors by name."""

    def encode(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        parts, dense = encoders.int4_encode(w, group)
        return {name.removesuffix("weight") + k: v for k, v in parts.items()}, dense

    stored, dense = _convert(directory, pattern, encode)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {**weights, "group_size": group}}},
        "ignore": ["lm_head"],
    }
    rewrite(directory, stored, settings)
    return dense


def to_gptq(directory: Path, group: int = 32, pattern: str = r"experts\.\d+\..*weight$") -> dict:
    """Rewrite per-expert matrices as GPTQ int4; returns the dense tensors by name."""

    def encode(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        parts, dense = encoders.gptq_encode(w, group)
        return {name.removesuffix("weight") + k: v for k, v in parts.items()}, dense

    stored, dense = _convert(directory, pattern, encode)
    rewrite(directory, stored, {"quant_method": "gptq", "bits": 4, "group_size": group})
    return dense


def to_nvfp4(directory: Path, by: str = "modelopt", pattern: str = LINEARS) -> dict:
    """Rewrite the blocks' linear layers as NVFP4 of ModelOpt or of compressed-tensors; returns the
    dense tensors by name.
    """
    ours = by == "modelopt"
    if ours:
        names = ("weight", "weight_scale", "weight_scale_2", "input_scale")
    else:
        names = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")

    def encode(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        parts, dense = encoders.nvfp4_encode(w, divide=not ours)
        values = (*parts.values(), torch.ones(1))
        stem = name.removesuffix("weight")
        return {stem + k: v for k, v in zip(names, values, strict=True)}, dense

    stored, dense = _convert(directory, pattern, encode)
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    if ours:
        settings = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    else:
        settings = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
        settings["config_groups"] = {"group_0": {"weights": weights, "targets": ["Linear"]}}
    rewrite(directory, stored, settings)
    return dense


def to_awq(directory: Path, group: int = 32, pattern: str = r"experts\.\d+\..*weight$") -> dict:
    """Rewrite per-expert matrices as AutoAWQ does; returns the dense tensors by name."""

    def encode(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        parts, dense = encoders.awq_encode(w, group)
        return {name.removesuffix("weight") + k: v for k, v in parts.items()}, dense

    stored, dense = _convert(directory, pattern, encode)
    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True}
    rewrite(directory, stored, {**settings, "version": "gemm"})
    return dense


def save_tokenizer(directory: Path) -> None:
    """A tokenizer of 50 words, "w0" … "w33" and special ones; fits every model here."""
    special = ["<pad>", "<s>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(12))]
    # The letters are for types whose tokenizer class is fixed: it splits words into bytes.
    words = [*special, *(f"w{i}" for i in range(34)), "w", *"0123456789", "\u0120"]
    vocabulary = {w: i for i, w in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)


def save_text(path: Path, words: int, seed: int = 0) -> Path:
    """Random words that `save_tokenizer` knows."""
    g = torch.Generator().manual_seed(seed)
    path.write_text(" ".join(f"w{int(i)}" for i in torch.randint(0, 34, (words,), generator=g)))
    return path
