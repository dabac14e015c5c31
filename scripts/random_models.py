"""Random checkpoints of realistic shapes, written without ever holding one in memory."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
)

POOL = 2**24  # random values that tensors are cut from; drawing all of them anew would take longer


def qwen(blocks: int, experts: int, hidden: int = 2048, width: int = 768) -> dict[str, Any]:
    """Qwen3-MoE, by default with the shapes of Qwen3-30B-A3B."""
    heads = max(1, hidden // 64)
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "moe_intermediate_size": width,
        "num_hidden_layers": blocks,
        "num_experts": experts,
        "num_experts_per_tok": min(8, experts),
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 8),
        "head_dim": 128 if hidden >= 1024 else 32,
        "vocab_size": 151936 if hidden >= 2048 else 512,
        "max_position_embeddings": 4096,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    }


def switch(experts: int) -> dict[str, Any]:
    """An encoder and a decoder block, both sparse, with experts of switch-c-2048's shape."""
    return {
        "model_type": "switch_transformers",
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "d_model": 2080,
        "d_ff": 6144,
        "d_kv": 64,
        "num_heads": 32,
        "num_layers": 1,
        "num_sparse_encoder_layers": 1,
        "num_decoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_experts": experts,
        "expert_capacity": 4096,
        "vocab_size": 32128,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 2,
    }


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes as publishers ship them, a matrix of its own for every expert."""
    settings = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    parsed = AutoConfig.for_model(config["model_type"], **settings)
    auto = AutoModelForSeq2SeqLM if parsed.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(parsed, dtype=torch.bfloat16)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for name, t in model.state_dict().items():
        shape = list(t.shape)
        if name in tied:
            continue
        if name.endswith("experts.gate_up_proj"):
            for e in range(shape[0]):
                stem = f"{name.removesuffix('gate_up_proj')}{e}."
                yield f"{stem}gate_proj.weight", [shape[1] // 2, shape[2]]
                yield f"{stem}up_proj.weight", [shape[1] // 2, shape[2]]
        elif name.endswith("experts.down_proj"):
            for e in range(shape[0]):
                yield f"{name.removesuffix('down_proj')}{e}.down_proj.weight", shape[1:]
        else:
            yield name, shape


def generate(config: dict[str, Any], out: Path, shard: int = 4 * 10**9) -> int:
    """Writes a random bf16 checkpoint with a tokenizer; returns the bytes of its weights."""
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    generator = torch.Generator().manual_seed(0)
    pool = (torch.randn(POOL, generator=generator) * 0.02).bfloat16().view(torch.uint8).numpy().data
    ones = torch.ones(POOL // 4, dtype=torch.bfloat16).view(torch.uint8).numpy().data
    parts: list[list[tuple[str, list[int], int]]] = [[]]
    size = 0
    for name, shape in tensors(config):
        n = 2 * torch.Size(shape).numel()
        if parts[-1] and size + n > shard:
            parts.append([])
            size = 0
        parts[-1].append((name, shape, n))
        size += n
    where, total, offset = {}, 0, 0
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        header, at = {}, 0
        for name, shape, n in part:
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + n]}
            where[name] = file
            at += n
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(out / file, "wb", buffering=0) as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for _, shape, n in part:
                if len(shape) == 1:  # norms
                    f.write(ones[:n])
                    continue
                offset = (offset + 999983 * 2) % len(pool)
                done = 0
                while done < n:
                    piece = pool[offset : offset + n - done]
                    f.write(piece)
                    done += len(piece)
                    offset = (offset + len(piece)) % len(pool)
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        total += at
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    special = ["<pad>", "<s>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(100))]
    words = {w: i for i, w in enumerate([*special, *(f"w{i}" for i in range(400))])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(out)
    return total
