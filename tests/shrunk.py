"""Tiny models of every type in transformers whose experts use the fused interface, made from the
types' own default configurations by shrinking every width.

`shrink` knows names of settings, not families; `CHANGES` holds the few settings that a type needs
besides.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING_NAMES,
    model_type_to_module_name,
)

LAYERS, VOCABULARY = 4, 128
_AUTO = {  # Auto classes in the order in which they are asked, and the attribute with their table
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
}


@cache
def discover() -> dict[str, str]:
    """{model type: Auto class that builds it, or "" if none generates text} of every model folder
    whose experts are under ``@use_experts_implementation``. Types of a part of a model (a vision
    tower, say) are left out: they come with the whole.
    """
    root = Path(transformers.__file__).parent / "models"
    folders = {
        f.parent.name
        for f in root.glob("*/modeling_*.py")
        if "@use_experts_implementation" in f.read_text(encoding="utf-8")
    }
    found: dict[str, str] = {}
    for folder in sorted(folders):
        kinds = [t for t in CONFIG_MAPPING_NAMES if model_type_to_module_name(t) == folder]
        autos = {
            t: next((a for a, table in _AUTO.items() if t in getattr(modeling_auto, table)), "")
            for t in kinds
        }
        whole = {t: a for t, a in autos.items() if a} or {kinds[0]: ""}
        found |= whole
    return found


def several_classes() -> list[str]:
    """The types of `discover` that two Auto classes build as different models: the text alone, and
    what is published.
    """
    tables = [getattr(modeling_auto, table) for table in _AUTO.values()]
    names = {kind: {str(t[kind]) for t in tables if kind in t} for kind in discover()}
    return [kind for kind, classes in names.items() if len(classes) > 1]


# (pattern of a setting's name, new value). The first match decides; values that are no plain number
# keep their kind. Patterns are matched against the whole name.
_RULES: tuple[tuple[str, Any], ...] = (
    (r"pad_token_id", 0),
    (r"bos_token_id", 1),
    (r"eos_token_id", 2),
    (r"decoder_start_token_id", 1),
    (r"(vocab_size.*|.*_vocab_size)", VOCABULARY),
    (r"(num_hidden_layers|num_layers|n_layers|depth|layers|encoder_layers|decoder_layers)", LAYERS),
    (r"(first_k_dense_replace|num_dense_layers|moe_layer_start_index)", 1),
    (r"(moe_intermediate_size|expert_dim|moe_.*intermediate_size|expert_.*intermediate_size)", 32),
    (r"(intermediate_size|ffn_hidden_size|.*_intermediate_size|d_ff|ffn_dim)", 96),
    (r"(num_experts_per_tok|num_experts_per_token|top_k_experts|moe_k|moe_topk|moe_top_k|topk)", 2),
    (r"(n_shared_experts|num_shared_experts|moe_num_shared_experts)", 1),
    (r"(n_group|num_expert_group|topk_group|n_groups_moe)", 1),
    (r"(n_routed_experts|num_local_experts|num_experts|moe_num_experts|.*_num_experts)", 4),
    (r"(num_attention_heads|num_heads|n_heads|swa_num_attention_heads|.*_attention_heads)", 4),
    (r"(num_key_value_heads|.*_num_key_value_heads|.*_key_value_heads)", 2),
    (r"(qk_nope_head_dim|qk_rope_head_dim|v_head_dim|head_dim|.*_head_dim|kv_channels)", 16),
    (r"qk_head_dim", 32),
    (r"(q_lora_rank|kv_lora_rank|.*_lora_rank)", 32),
    (
        r"(hidden_size|d_model|hidden_size_per_layer_input|.*_hidden_size|.*_hidden_dim|embed_dim)",
        64,
    ),
    (r"(max_position_embeddings|max_seq_len.*|.*max_position_embeddings)", 256),
    (r"(sliding_window|.*_sliding_window|sliding_window_size|.*chunk_size)", 8),
)
_TOKEN = re.compile(r".*token_(id|index)$")


def shrink(values: dict[str, Any], taken: list[int] | None = None) -> dict[str, Any]:
    """A configuration as JSON values with every width small.

    Args:
        values: `config.to_dict()`.
        taken: counter of special token numbers handed out.
    """
    taken = [16] if taken is None else taken
    layers = values.get("num_hidden_layers")
    kept = _kept_layers(values, layers)
    out: dict[str, Any] = {}
    for name, value in values.items():
        if name == "per_layer_config":
            own = {int(k): _shrunk(v, values, taken) for k, v in value.items()}
            out[name] = {kept.index(k): v for k, v in own.items() if k in kept}
        elif isinstance(value, dict):
            out[name] = value if "rope" in name else _shrunk(value, values, taken)
        elif isinstance(value, list) and layers and len(value) == layers:
            out[name] = [value[i] for i in kept]
        else:
            out[name] = _one(name, value, taken)
    if values.get("kv_lora_rank"):  # latent attention has no groups of heads
        out["num_key_value_heads"] = out["num_attention_heads"]
    return out


def _shrunk(inner: dict[str, Any], outer: dict[str, Any], taken: list[int]) -> dict[str, Any]:
    latent = {k: outer[k] for k in ("kv_lora_rank", "num_attention_heads") if k in outer}
    added = {k: v for k, v in latent.items() if "num_key_value_heads" in inner and k not in inner}
    return {k: v for k, v in shrink({**added, **inner}, taken).items() if k not in added}


def _kept_layers(values: dict[str, Any], layers: int | None) -> list[int]:
    """Up to `LAYERS` layers of a configuration, one of every kind first."""
    if not layers:
        return []
    lists = [v for v in values.values() if isinstance(v, list) and len(v) == layers]
    own = {int(k): str(v) for k, v in values.get("per_layer_config", {}).items()}
    kinds = [(*(str(v[i]) for v in lists), own.get(i)) for i in range(layers)]
    first = list({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())
    rest = [i for i in range(layers) if i not in first]
    return sorted((sorted(first) + rest)[:LAYERS])


def _one(name: str, value: Any, taken: list[int]) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or not isinstance(name, str):
        return value
    if value == 0 and "token" not in name:  # a part that is switched off
        return value
    for pattern, new in _RULES:
        if re.fullmatch(pattern, name):
            return new
    if _TOKEN.match(name) and value >= VOCABULARY:
        taken[0] += 1
        return VOCABULARY - taken[0]
    return value


# Settings that a type needs besides, by model type; a nested configuration is changed in place.
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 4]}
_GEMMA = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
CHANGES: dict[str, dict[str, Any]] = {
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", *["sparse"] * 3], "num_experts_per_tok": 2}
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma": {"text_config": _GEMMA},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {
        "text_config": {"head_dim": 32},
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": {"head_dim": 32},
    "ernie4_5_vl_moe": {
        "text_config": {"moe_intermediate_size": [32, 32], "rope_parameters": _MROPE}
    },
    "gemma4": {"text_config": _GEMMA},
    "gemma4_text": _GEMMA,
    "glm4v_moe": {"text_config": {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]}}},
    "glm5_next": {"text_config": {"qk_head_dim": 16}},
    "granitemoehybrid": {
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mistral4": {"head_dim": 32},
    "muse_spark": {"out_hidden_size": 64, "projector_hidden_size": 64},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 110, "audio_start_token_id": 109},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "zaya": {"num_experts_per_tok": 1},
}


def config_of(kind: str) -> Any:
    """The tiny configuration of a model type."""
    plain = transformers.AutoConfig.for_model(kind)
    values = shrink(plain.to_dict())
    _merge(values, CHANGES.get(kind, {}))
    for name in ("model_type", "transformers_version", "architectures"):
        values.pop(name, None)
    return type(plain)(**values)


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> None:
    for name, new in changes.items():
        if isinstance(new, dict) and isinstance(values.get(name), dict):
            _merge(values[name], new)
        else:
            values[name] = new


def make(kind: str, seed: int = 0, auto: str = "") -> Any:
    """A tiny random model in float32, eval mode; no parameter is left at a constant. `auto` names
    an Auto class, by default the one that `discover` found."""
    torch.manual_seed(seed)
    auto = getattr(transformers, auto or discover()[kind])
    config = config_of(kind)
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                p.normal_(0, 0.08)
            elif "bias" in name or "sink" in name:
                p.normal_(0, 0.02)
    return model


def family_of(kind: str) -> str:
    """The folder of transformers that a type belongs to."""
    return model_type_to_module_name(kind)
