"""Tiny random models of every supported family, and a tiny compressed checkpoint, for all tests."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from qmoe.container import ContainerWriter
from qmoe.families.layouts import KINDS, find_experts, read_expert, write_expert
from qmoe.save import plain_config
from qmoe.types import QuantizedMatrix, grid_index, grid_scale

torch.set_num_threads(1)

_BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
_TOP2 = {"num_experts": 4, "num_experts_per_tok": 2}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_NARROW = {"moe_intermediate_size": 32}
_SHARED = {"shared_expert_intermediate_size": 48}
_LINEAR = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_hidden_layers": 4,
}
CONFIGS: dict[str, dict] = {
    "mixtral": _BASE | _LOCAL,
    "qwen2_moe": _BASE | _TOP2 | _NARROW | _SHARED,
    "qwen3_moe": _BASE | _TOP2 | _NARROW | {"head_dim": 16, "decoder_sparse_step": 1},
    "qwen3_next": _BASE | _TOP2 | _NARROW | _SHARED | _LINEAR | {"head_dim": 16},
    "olmoe": _BASE | _TOP2 | {"intermediate_size": 32},
    "deepseek_v2": _BASE | _MLA | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1},
    "deepseek_v3": _BASE | _MLA | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1},
    "glm4_moe": _BASE
    | _NARROW
    | {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 16,
    },
    "gpt_oss": _BASE | _LOCAL | {"head_dim": 16, "sliding_window": 8, "intermediate_size": 32},
    "granitemoe": _BASE | _LOCAL | {"intermediate_size": 32},
    "phimoe": _BASE | _LOCAL | {"intermediate_size": 32},
    "llama4_text": _BASE
    | {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size": 32,
        "intermediate_size_mlp": 96,
        "head_dim": 16,
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
    "jamba": _BASE
    | _TOP2
    | {
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
    "minimax_m2": _BASE | _LOCAL | {"head_dim": 16, "intermediate_size": 32, "rotary_dim": 16},
    "ernie4_5_moe": _BASE
    | _NARROW
    | {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "head_dim": 16,
    },
    "jetmoe": _BASE
    | _LOCAL
    | {"kv_channels": 16, "intermediate_size": 32, "num_attention_heads": 4},
    "hunyuan_v1_moe": _BASE
    | {"num_experts": 4, "moe_topk": 2, "head_dim": 16, "intermediate_size": 32},
    "switch_transformers": {
        "vocab_size": 128,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_heads": 4,
        "num_experts": 4,
        "expert_capacity": 4,
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


@pytest.fixture(params=list(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    """Every supported model type in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def build_model() -> Callable[..., PreTrainedModel]:
    """``build(family, seed=0, **changes)``: a tiny random float32 model in eval mode."""

    def build(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **CONFIGS[family] | changes)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():  # several classes leave parameters at zero or uninitialised
            for name, p in model.named_parameters():
                if p.ndim >= 2:
                    p.normal_(0, 0.08)
                elif "bias" in name or "sink" in name:
                    p.normal_(0, 0.02)
            for name, b in model.named_buffers():
                if "correction_bias" in name:
                    b.normal_(0, 0.02)
        return model

    return build


@pytest.fixture(scope="session")
def model_inputs() -> Callable[[PreTrainedModel], dict[str, torch.Tensor]]:
    """Token batches for any model of `build_model`."""

    def inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(5)
        out = {"input_ids": torch.randint(3, 127, (2, 12), generator=g)}
        if model.config.is_encoder_decoder:
            out["decoder_input_ids"] = torch.randint(3, 127, (2, 7), generator=g)
        return out

    return inputs


def _round(weight: torch.Tensor) -> QuantizedMatrix:
    """Rounds to -2..2 with one scale per row; enough for tests of everything but solvers."""
    index = grid_index(weight.abs().mean(1) * 1.5, step=4)
    codes = (weight / grid_scale(index)[:, None]).round().clamp(-2, 2).to(torch.int8)
    return QuantizedMatrix(codes, index, torch.zeros(weight.shape[1], dtype=torch.int16))


def _block_of(name: str) -> str:
    """The block that a tensor belongs to: its path up to the first number, or "rest"."""
    parts = name.split(".")
    at = next((i for i, p in enumerate(parts) if p.isdecimal()), None)
    return "rest" if at is None else ".".join(parts[: at + 1])


def _write(model: PreTrainedModel, out: Path, **options: object) -> PreTrainedModel:
    """Rounds the experts of a model and writes it compressed; returns a dense copy with the
    rounded weights."""
    dense = copy.deepcopy(model)
    found = {layout.path: (layout, module) for layout, module in find_experts(dense)}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    tensors = {k: v for k, v in model.state_dict().items() if k not in tied}
    for layout, module in found.values():
        for name in KINDS[layout.kind].encoded(module):
            del tensors[f"{layout.path}.{name}"]
    blocks = list(dict.fromkeys(_block_of(n) for n in [*tensors, *found]))
    with ContainerWriter(out, **options) as writer:
        for name in blocks:
            with writer.block(name) as block:
                for key, tensor in tensors.items():
                    if _block_of(key) == name:
                        block.add_tensor(key, tensor)
                for path, (layout, module) in found.items():
                    if _block_of(path) != name:
                        continue
                    experts = block.experts(layout)
                    rounded = [
                        {k: _round(w) for k, w in read_expert(module, e).items()}
                        for e in range(layout.experts)
                    ]
                    for p in layout.projections:
                        matrices = [r[p.name] for r in rounded]
                        half = layout.experts // 2
                        experts.add_group(p.name, range(half), matrices[:half])
                        experts.add_group(p.name, range(half, layout.experts), matrices[half:])
                    for e, r in enumerate(rounded):
                        write_expert(module, e, {k: m.dequantize() for k, m in r.items()})
                    tokens = [3 * e for e in range(layout.experts)]
                    notes = ["no tokens: rounded" if not t else "" for t in tokens]
                    block.finish_experts(path, tokens, notes)
        config = plain_config(model.config) | {"architectures": [type(model).__name__]}
        writer.finish(
            blocks,
            config=config | {"dtype": "float32"},
            settings={"method": "round"},
            versions={"qmoe": "test"},
            source={"name": "random", "bytes": 1000},
            extra_files={
                "generation_config.json": model.generation_config.to_json_string().encode(),
                "tokenizer_config.json": b"{}\n",
            },
        )
    return dense


@pytest.fixture(scope="session")
def write_compressed() -> Callable[..., PreTrainedModel]:
    """``write(model, out, **options of ContainerWriter)`` -> dense model with the rounded
    weights."""
    return _write


@pytest.fixture(scope="session")
def compressed(
    tmp_path_factory: pytest.TempPathFactory, build_model: Callable[..., PreTrainedModel]
) -> tuple[Path, PreTrainedModel]:
    """A compressed tiny Mixtral (not to be changed) and its dense equal."""
    out = tmp_path_factory.mktemp("compressed") / "mixtral"
    return out, _write(build_model("mixtral"), out)
