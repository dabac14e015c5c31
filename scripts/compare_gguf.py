"""Whole GGUF files of a small Qwen3-MoE checkpoint, for scripts/compare: written for
llama.cpp's own mixed recipes and read back."""

import json
import re
from pathlib import Path

import numpy as np
from compare_peers import Ggml, Importance, Weights, of_weight

NAMES = {  # of the checkpoint -> of GGUF, outside of experts
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INSIDE = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
}
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


def gguf_name(name: str) -> str:
    """A tensor's name in a GGUF file; all experts of a projection are one tensor there."""
    if name in NAMES:
        return NAMES[name]
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if found and (expert := re.fullmatch(r"mlp\.experts\.\d+\.(\w+)", found[2])):
        return f"blk.{found[1]}.{EXPERTS[expert[1]]}.weight"
    if found and found[2] in INSIDE:
        return f"blk.{found[1]}.{INSIDE[found[2]]}.weight"
    raise ValueError(f"{name} has no place in a qwen3moe GGUF file")


def write_f32(source: Path, weights: Weights, out: Path) -> None:
    """The checkpoint as a float32 GGUF file; without a vocabulary, which quantizing does not read.

    Raises:
        ImportError: the package `gguf` is missing.
        ValueError: not a qwen3_moe checkpoint.
    """
    import gguf

    config = json.loads((source / "config.json").read_text())
    if config["model_type"] != "qwen3_moe":
        raise ValueError(
            f"whole GGUF files are written of qwen3_moe, not of {config['model_type']}"
        )
    w = gguf.GGUFWriter(str(out), "qwen3moe")
    w.add_block_count(config["num_hidden_layers"])
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(config["num_attention_heads"])
    w.add_head_count_kv(config["num_key_value_heads"])
    w.add_key_length(config["head_dim"])
    w.add_value_length(config["head_dim"])
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_vocab_size(config["vocab_size"])
    w.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    w.add_expert_used_count(config["num_experts_per_tok"])
    w.add_expert_feed_forward_length(config["moe_intermediate_size"])
    w.add_string("tokenizer.ggml.model", "none")
    stacked: dict[str, list[np.ndarray]] = {}
    number = {n: int(m[1]) if (m := re.search(r"experts\.(\d+)", n)) else 0 for n in weights}
    for name in sorted(weights, key=lambda n: number[n]):
        stacked.setdefault(gguf_name(name), []).append(weights[name].float().numpy())
    for name, parts in stacked.items():
        w.add_tensor(name, np.stack(parts) if len(parts) > 1 else parts[0])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def mixed_file(
    ggml: Ggml, source: Path, weights: Weights, importance: Importance, ftype: int, work: Path
) -> tuple[float, float]:
    """Replaces all weights by what a mixed file would restore, with the importance matrix.

    Returns:
        Stored bits per weight of the experts, and of the whole file.
    """
    import gguf

    work.mkdir(parents=True, exist_ok=True)
    plain, mixed = work / "f32.gguf", work / f"{ftype}.gguf"
    write_f32(source, weights, plain)
    ggml.types_of_file(plain, mixed, ftype)
    kinds = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(str(mixed)).tensors}
    bits = count = 0
    for name, w in weights.items():
        kind = kinds[gguf_name(name)]
        if kind in ("f32", "f16"):
            size = w.numel() * (4 if kind == "f32" else 2)
        else:
            imp = of_weight(importance, name, w.shape[1])
            weights[name], size = ggml.round_trip(kind, w, imp)
        if ".experts." in name:
            bits, count = bits + 8 * size, count + w.numel()
    whole = 8 * mixed.stat().st_size / sum(w.numel() for w in weights.values())
    for path in (plain, mixed):
        path.unlink()
    return bits / count, whole
