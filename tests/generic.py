"""Tiny models of every type in transformers whose experts use the fused interface, made from the
types' own default configurations by shrinking every width.

`shrink` knows names of settings, not families; `CHANGES` holds the few settings that a type needs
besides. Tests and scripts/families take this module by path, since tests are no package.
"""

import re
from collections.abc import Mapping
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

import qmoe
from qmoe.compression.pipeline import compress
from qmoe.compression.settings import Settings
from qmoe.measure.score import load_any
from qmoe.models.families.find import KINDS, find_experts, repair
from qmoe.models.streamed import StreamedModel
from qmoe.publish.export import export
from qmoe.publish.verify import verify
from qmoe.source.checkpoint import open_checkpoint
from qmoe.store.reader import Container

LAYERS, VOCABULARY = 4, 128
DELTA, KL = 0.02, 1e-3  # a step of rd at which tiny models take about 8 bits, and what it may cost
# a few positions at which a router decides otherwise make the mean of a random model: up to 6.4
# times what plain rounding costs was seen
FLIPS = 8
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


def run(kind: str, work: Path, tiny: Any) -> dict[str, bool | float]:
    """Takes a random model of one type through the whole path; see `prove`."""
    model = make(kind)
    model.save_pretrained(work / "source")
    return prove(work / "source", work, tiny, type(model))


def prove(
    source: Path, work: Path, tiny: Any, model_class: Any, tokens: int = 480
) -> dict[str, bool | float]:
    """Takes a checkpoint through the whole path.

    Args:
        source: a checkpoint without a tokenizer; one is written to it.
        work: where to work.
        tiny: the module tests/tiny.py.
        model_class: of transformers, that loads the export.
        tokens: of calibration.

    Returns:
        What was proven: {"compress", "logits", "generate", "save"} are True, "kl" is the divergence
        of the compressed model from the source in nats per token, compressed by `rd` at about 8
        bits: at most `KL`, or `FLIPS` times what plain rounding to 8 bits costs.

    Raises:
        AssertionError: two models that must be equal are not. Whatever else a step raises.
    """
    tiny.save_tokenizer(source)
    text = tiny.save_text(work / "text.txt", 2 * tokens)
    settings = Settings(
        method="rd",
        delta=DELTA,
        calib=str(text),
        calib_tokens=tokens,
        ctx=24,
        unseen=0,
        solver_options={"gradient": 0},
    )
    compress(str(source), work / "q", settings)
    passed: dict[str, bool | float] = {"compress": True}
    verify(work / "q")
    loaded = qmoe.load(work / "q", dtype=torch.float32)
    export(work / "q", work / "dense", "float32")
    dense, info = model_class.from_pretrained(work / "dense", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    carried = Container.open(work / "q").carried  # they have no module in the export either
    assert not info["unexpected_keys"] or carried, info["unexpected_keys"]
    repair(dense)
    inputs = inputs_for(dense)
    expected = logits(dense, inputs)
    _close(logits(loaded, inputs), expected)
    passed["logits"] = True
    whole = load_any(str(source), "float32", torch.device("cpu"))
    original = logits(whole, inputs)
    passed["kl"] = divergence(original, logits(loaded, inputs))
    if passed["kl"] > KL:  # near ties of a router flip whatever is rounded how
        plain = divergence(original, logits(rounded(whole), inputs))
        assert passed["kl"] <= FLIPS * plain, f"KL {passed['kl']}, plain rounding {plain}"
    ids = loaded.generate(
        inputs["input_ids"][:2], max_new_tokens=3, do_sample=False, pad_token_id=0
    )
    assert len(ids) == 2
    passed["generate"] = True
    loaded.save_pretrained(work / "again")
    again = qmoe.load(work / "again", dtype=torch.float32)
    assert torch.equal(logits(again, inputs), logits(loaded, inputs))
    passed["save"] = True
    return passed


@torch.no_grad()
def rounded(model: Any) -> Any:
    """The model, its experts' matrices rounded to 8 bits with a scale for every row."""
    for layout, module in find_experts(model):
        kind = KINDS[layout.kind]
        for expert in range(layout.experts):
            matrices = {}
            for name, weight in kind.read(module, expert).items():
                scale = weight.abs().amax(1, keepdim=True) / 127
                matrices[name] = (weight / scale).round() * scale
            kind.write(module, expert, matrices)
    return model


def divergence(source: torch.Tensor, got: torch.Tensor) -> float:
    """Mean KL(source || got) in nats per token, of logits."""
    p, q = (torch.log_softmax(x.float(), -1).flatten(0, -2) for x in (source, got))
    return float(torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True))


def inputs_for(model: Any) -> dict[str, torch.Tensor]:
    """A token batch."""
    g = torch.Generator().manual_seed(5)
    out = {"input_ids": torch.randint(16, 50, (16, 24), generator=g)}
    if model.config.is_encoder_decoder:
        out["decoder_input_ids"] = torch.randint(16, 50, (16, 12), generator=g)
    return out


@torch.no_grad()
def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of one forward without a cache."""
    return model(**inputs, use_cache=False).logits


def _close(got: torch.Tensor, expected: torch.Tensor) -> None:
    worst = float((got - expected).abs().max())
    assert torch.isfinite(expected).all()
    assert worst <= 1e-4 * max(1.0, float(expected.abs().max())), f"logits differ by {worst}"


PUBLISHED = {  # types of which checkpoints are published in another class than the text-only one
    "dots3_note": "Dots3NoteForConditionalGeneration",
    "llama4": "Llama4ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen4_exp": "Qwen4ExpForConditionalGeneration",
}
# Types that cannot go through, with the reason.
REASONS: dict[str, str] = {
    "diffusion_gemma": "generates blocks of text by diffusion; it is no causal language model, and "
    "`qmoe compress` says so.",
    "openai_privacy_filter": "labels tokens and generates no text; `qmoe compress` says so.",
    "qwen3_omni_moe": "a pipeline of two language models and a vocoder; its thinker, "
    "`qwen3_omni_moe_thinker`, is supported.",
}
STEPS = ("compress", "logits", "generate", "save")


def attempt(kind: str, work: Path, tiny: Any) -> dict[str, Any]:
    """One row of the table for a type with the fused interface; see `row`."""
    family, reason = family_of(kind), REASONS.get(kind, "")
    if reason:
        return row(family, kind, reason=reason)
    try:
        passed = run(kind, work, tiny)
    except ImportError as e:  # transformers wants a package for this type alone
        if (e.name or "").startswith("qmoe"):
            raise
        reason = f"not run: transformers needs a package that is not installed ({e})."
        return row(family, kind, reason=reason)
    return row(family, kind, passed, work)


def attempt_published(kind: str, work: Path, tiny: Any) -> dict[str, Any]:
    """The row of a type in the class in which it is published."""
    model = make(kind, auto="AutoModelForImageTextToText")
    assert type(model).__name__ == PUBLISHED[kind]
    model.save_pretrained(work / "source")
    passed = prove(work / "source", work, tiny, type(model))
    return row(f"{family_of(kind)}, as published", kind, passed, work)


def row(
    family: str,
    kind: str,
    passed: Mapping[str, bool | float] | None = None,
    work: Path | None = None,
    reason: str = "",
) -> dict[str, Any]:
    """What a line of docs/families.md says.

    Args:
        family: for people.
        kind: model type in the source's config.json.
        passed: what `prove` returned.
        work: where they ran.
        reason: why they did not.
    """
    found = dict(passed or {})
    kl = found.pop("kl", None)
    out = {"family": family, "kind": kind, "passed": list(found), "kl": kl, "reason": reason}
    if work is None:
        return out | {"source": "", "experts": ""}
    return out | {"source": stored_as(work / "source"), "experts": described(work / "q")}


def stored_as(source: Path) -> str:
    """The format of a source's experts, and what it holds that no module takes."""
    checkpoint = open_checkpoint(source)
    found = checkpoint.quantization or "plain"
    unused = StreamedModel(checkpoint).unused
    return f"{found}, {len(unused)} tensors without a module" if unused else found


def described(compressed: Path) -> str:
    """How the experts of a model are laid out."""
    container = Container.open(compressed, check=False)
    kinds = {(m.kind, tuple(p.name for p in m.projections)) for m in container.modules.values()}
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in sorted(kinds))


def family_of(kind: str) -> str:
    """The folder of transformers that a type belongs to."""
    return model_type_to_module_name(kind)
