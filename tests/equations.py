"""Checkpoints as foreign training programs write them, and their layers' equations, written on the
source's own tensors.
"""

import enum
import json
import math
import sys
from argparse import Namespace
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

V, H, L, HEADS, E = 50, 32, 4, 4, 4  # vocabulary, width, layers, heads, experts
I = 24  # noqa: E741 - the width of an expert, as in the papers


def draw(shapes: dict, seed: int = 0, scale: float = 0.3) -> dict:
    g = torch.Generator().manual_seed(seed)
    norm = ("norm.weight", "layernorm.weight")
    return {
        k: torch.randn(s, generator=g) * scale + (1.0 if k.endswith(norm) else 0.0)
        for k, s in shapes.items()
    }


def attention(q, k, v, scale):
    """[T, heads, d] each, causal -> [T, heads * d], query by query."""
    out = torch.zeros(len(q), q.shape[1] * v.shape[2])
    for t in range(len(q)):
        heads = []
        for h in range(q.shape[1]):
            p = (k[: t + 1, h] @ q[t, h] * scale).softmax(0)
            heads.append(p @ v[: t + 1, h])
        out[t] = torch.cat(heads)
    return out


def layer_norm(x, t, name):
    return F.layer_norm(x, x.shape[-1:], t[name + ".weight"], t[name + ".bias"], 1e-5)


# --- OpenMoE -----------------------------------------------------------------------------------

D = 16  # width of a head; HEADS * D != H on purpose


def openmoe_source(d, seed=0, **changes):
    s = {"model.embed_tokens.weight": (V, H), "model.norm.weight": (H,), "lm_head.weight": (V, H)}
    for i in range(L):
        p = f"model.layers.{i}."
        s |= {p + f"self_attn.{n}_proj.weight": (3 * D, H) for n in "qkv"}
        s |= {p + "self_attn.o_proj.weight": (H, 3 * D), p + "input_layernorm.weight": (H,)}
        s |= {p + "post_attention_layernorm.weight": (H,)}
        mlp = "mlp."
        if (i + 1) % 2 == 0:
            s |= {p + "mlp.gate_weight": (E, H), p + "mlp.experts.wi_gate": (E, H, 2 * I)}
            s |= {p + "mlp.experts.wi_up": (E, H, I), p + "mlp.experts.wo": (E, I, H)}
            s |= {p + "pre_extra_mlp_layernorm.weight": (H,)}
            mlp = "extra_mlp."
        s |= {p + mlp + "gate_proj.weight": (2 * I, H), p + mlp + "up_proj.weight": (I, H)}
        s |= {p + mlp + "down_proj.weight": (H, I)}
    t = draw(s, seed)
    c = {"model_type": "llama", "architectures": ["OpenMoeForCausalLM"], "hidden_act": "swiglu"}
    c |= {"vocab_size": V, "hidden_size": H, "intermediate_size": I, "num_hidden_layers": L}
    c |= {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": D, "num_experts": E}
    c |= {"moe_layer_interval": 2, "router_topk": 2, "rms_norm_eps": 1e-6, "mlp_gated": True}
    c |= {"torch_dtype": "float32", "max_position_embeddings": 64, "bos_token_id": 1} | changes
    d.mkdir(exist_ok=True)
    (d / "config.json").write_text(json.dumps(c))
    (d / "tokenizer_config.json").write_text("{}")
    save_file(t, d / "model.safetensors")
    return t


def openmoe_equations(t, ids):
    def rms(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * t[name + ".weight"]

    def rotate(x):  # [T, heads, D]: pairs (j, j + D/2) turn by position / 10000^(2j/D)
        out = x.clone()
        for pos in range(len(x)):
            for j in range(D // 2):
                a = pos / 10000 ** (2 * j / D)
                u, w = x[pos, :, j], x[pos, :, j + D // 2]
                out[pos, :, j] = u * math.cos(a) - w * math.sin(a)
                out[pos, :, j + D // 2] = w * math.cos(a) + u * math.sin(a)
        return out

    def network(x, gate, up, down):  # matrices [in, out]
        a, b = (x @ gate).chunk(2, -1)
        return (a * b * torch.sigmoid(b) * (x @ up)) @ down

    x = t["model.embed_tokens.weight"][ids]
    for i in range(L):
        p = f"model.layers.{i}."
        n = rms(x, p + "input_layernorm")
        q, k, v = ((n @ t[p + f"self_attn.{c}_proj.weight"].T).view(-1, 3, D) for c in "qkv")
        x = x + attention(rotate(q), rotate(k), v, 1.0) @ t[p + "self_attn.o_proj.weight"].T
        n = rms(x, p + "post_attention_layernorm")
        dense = "mlp."
        if (i + 1) % 2 == 0:
            y = torch.zeros_like(x)
            for s in range(len(x)):
                prob = (t[p + "mlp.gate_weight"] @ n[s]).softmax(0)
                for e in prob.topk(2).indices.tolist():
                    w = [t[p + f"mlp.experts.{m}"][e] for m in ("wi_gate", "wi_up", "wo")]
                    y[s] += prob[e] * network(n[s], *w)
            x = x + y
            n, dense = rms(x, p + "pre_extra_mlp_layernorm"), "extra_mlp."
        w = [t[p + dense + f"{m}_proj.weight"].T for m in ("gate", "up", "down")]
        x = x + network(n, *w)
    return rms(x, "model.norm") @ t["lm_head.weight"].T


# --- fairseq -----------------------------------------------------------------------------------

RANKS = 2


def fairseq_source(d, seed=0, **changes):
    s = {"decoder.embed_tokens.weight": (V, H)}
    experts = [{} for _ in range(RANKS)]
    for i in range(L):
        p = f"decoder.layers.{i}."
        for n in ("q", "k", "v", "out"):
            s |= {p + f"self_attn.{n}_proj.weight": (H, H), p + f"self_attn.{n}_proj.bias": (H,)}
        for n in ("self_attn_layer_norm", "final_layer_norm"):
            s |= {p + n + ".weight": (H,), p + n + ".bias": (H,)}
        network = {"fc1.weight": (I, H), "fc1.bias": (I,), "fc2.weight": (H, I), "fc2.bias": (H,)}
        if i % 2 == 1:
            s[p + "moe_layer.gate.wg.weight"] = (E, H)
            for rank in experts:
                for j in range(E // RANKS):
                    rank |= {p + f"moe_layer.experts.{j}.{k}": n for k, n in network.items()}
        else:
            s |= {p + k: n for k, n in network.items()}
    s |= {"decoder.layer_norm.weight": (H,), "decoder.layer_norm.bias": (H,)}
    shared = draw(s, seed)
    shared["decoder.version"] = torch.tensor([3.0])
    ranks = [draw(r, seed + 1 + i) for i, r in enumerate(experts)]
    a = {"decoder_attention_heads": HEADS, "activation_fn": "gelu", "tokens_per_sample": 40}
    a |= {"decoder_normalize_before": True, "share_decoder_input_output_embed": True}
    a |= {"decoder_learned_pos": False, "no_scale_embedding": False} | changes
    d.mkdir(exist_ok=True)
    torch.save({"model": shared, "cfg": {"model": Namespace(**a)}}, d / "model-shared.pt")
    for r, tensors in enumerate(ranks):
        torch.save({"model": tensors, "cfg": None}, d / f"model-rank-{r}.pt")
    return shared, ranks, a


def fairseq_equations(source, ids):
    t, ranks, a = source

    def linear(x, name, w=t):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    x = t["decoder.embed_tokens.weight"][ids] * math.sqrt(H)
    for s in range(len(ids)):  # positions begin behind the padding index 1
        for j in range(H // 2):
            angle = (s + 2) * math.exp(-j * math.log(10000) / (H // 2 - 1))
            x[s, j] += math.sin(angle)
            x[s, j + H // 2] += math.cos(angle)
    for i in range(L):
        p = f"decoder.layers.{i}."
        n = layer_norm(x, t, p + "self_attn_layer_norm")
        q, k, v = (linear(n, p + f"self_attn.{c}_proj").view(-1, HEADS, H // HEADS) for c in "qkv")
        x = x + linear(attention(q, k, v, (H // HEADS) ** -0.5), p + "self_attn.out_proj")
        n = layer_norm(x, t, p + "final_layer_norm")
        if i % 2 == 0:
            x = x + linear(F.gelu(linear(n, p + "fc1")), p + "fc2")
            continue
        y = torch.zeros_like(x)
        for s in range(len(ids)):
            prob = (t[p + "moe_layer.gate.wg.weight"] @ n[s]).softmax(0)
            top = prob.topk(1 if a.get("moe_top1_expert") else 2)
            total = 1.0 if a.get("moe_top1_expert") else top.values.sum()
            for e in top.indices.tolist():
                rank, j = divmod(e, E // RANKS)
                name, w = p + f"moe_layer.experts.{j}.", ranks[rank]
                out = linear(F.gelu(linear(n[s], name + "fc1", w)), name + "fc2", w)
                y[s] += prob[e] / total * out
        x = x + y
    out = t.get("decoder.output_projection.weight", t["decoder.embed_tokens.weight"])
    return layer_norm(x, t, "decoder.layer_norm") @ out.T


# --- Megatron-LM with MegaBlocks ---------------------------------------------------------------


FILE = "model_optim_rng.pt"


def megablocks_source(d, seed=0, gated=False, ranks=1, dense=(), file=FILE, **changes):
    """What Megatron-LM's save_checkpoint writes by default: `args` with an enumeration of the
    program itself, the states of the random number generators as numpy arrays.
    """
    s = {
        "embedding.word_embeddings.weight": (V, H),
        "embedding.position_embeddings.weight": (40, H),
    }
    for i in range(L):
        p = f"encoder.layers.{i}."
        for n in ("input_layernorm", "post_attention_layernorm"):
            s |= {p + n + ".weight": (H,), p + n + ".bias": (H,)}
        for n, rows in (("self_attention.query_key_value", 3 * H), ("self_attention.dense", H)):
            s |= {p + n + ".weight": (rows, H), p + n + ".bias": (rows,)}
        if i in dense:
            s |= {p + "mlp.dense_h_to_4h.weight": (I, H), p + "mlp.dense_h_to_4h.bias": (I,)}
            s |= {p + "mlp.dense_4h_to_h.weight": (H, I), p + "mlp.dense_4h_to_h.bias": (H,)}
            continue
        s |= {p + "mlp.moe.router.layer.weight": (E, H), p + "mlp.moe.experts.bias": (H,)}
        names = ("w1", "v1", "w2") if gated else ("w1", "w2")
        s |= {p + f"mlp.moe.experts.mlp.{n}": (E * I, H) for n in names}
    s |= {"encoder.final_layernorm.weight": (H,), "encoder.final_layernorm.bias": (H,)}
    t = draw(s, seed)
    a = {"num_layers": L, "hidden_size": H, "num_attention_heads": HEADS, "ffn_hidden_size": I}
    a |= {"moe_num_experts": E, "moe_top_k": 2, "moe_normalize_expert_weights": None} | changes
    folder = d / "iter_0000070"
    for r in range(ranks):
        tree = {"embedding": {}, "encoder": {}}
        for name, value in t.items():
            if ".experts.mlp." in name:
                value = value.chunk(ranks)[r].clone()
            top, rest = name.split(".", 1)
            if top == "embedding":
                tree[top].setdefault(rest.split(".")[0], {})["weight"] = value
            else:
                tree[top][rest] = value
        rank = folder / ("mp_rank_00" if ranks == 1 else f"mp_rank_00_{r:03d}")
        rank.mkdir(parents=True)
        state = {"args": Namespace(**a), "model": {"language_model": tree}, "iteration": 70}
        state |= {"checkpoint_version": 3.0, "rng_state": [{"np_rng_state": np.random.get_state()}]}
        save_as_megatron(state, rank / file)
    (d / "latest_checkpointed_iteration.txt").write_text("70\n")
    return t, a, gated


def save_as_megatron(state, path):
    """torch.save with ``args.model_type`` of a class that exists in the training program alone."""
    module = ModuleType("megatron.model.enums")
    module.ModelType = enum.Enum("ModelType", {"encoder_or_decoder": 1}, module=module.__name__)
    state["args"].model_type = module.ModelType.encoder_or_decoder
    names = ("megatron", "megatron.model", module.__name__)
    try:
        sys.modules.update(dict.fromkeys(names, module))
        torch.save(state, path)
    finally:
        for name in names:
            del sys.modules[name]


def megablocks_equations(source, ids):
    t, a, gated = source
    x = t["embedding.word_embeddings.weight"][ids]
    x = x + t["embedding.position_embeddings.weight"][: len(ids)]

    def linear(x, name):
        return x @ t[name + ".weight"].T + t[name + ".bias"]

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    for i in range(L):
        p = f"encoder.layers.{i}."
        n = layer_norm(x, t, p + "input_layernorm")
        qkv = linear(n, p + "self_attention.query_key_value").view(-1, HEADS, 3, H // HEADS)
        att = attention(*qkv.unbind(2), (H // HEADS) ** -0.5)
        x = x + linear(att, p + "self_attention.dense")
        n = layer_norm(x, t, p + "post_attention_layernorm")
        if p + "mlp.dense_h_to_4h.weight" in t:
            x = x + linear(gelu(linear(n, p + "mlp.dense_h_to_4h")), p + "mlp.dense_4h_to_h")
            continue
        y = torch.zeros_like(x)
        for s in range(len(ids)):
            prob = (t[p + "mlp.moe.router.layer.weight"] @ n[s]).softmax(0)
            top = prob.topk(a["moe_top_k"])
            norm = a["moe_normalize_expert_weights"]
            total = 1.0 if norm is None else top.values.abs().pow(norm).sum() ** (1 / norm)
            for e in top.indices.tolist():
                m = {
                    k: t[p + f"mlp.moe.experts.mlp.{k}"].view(E, I, H)[e]
                    for k in (("w1", "v1", "w2") if gated else ("w1", "w2"))
                }
                h = gelu(m["w1"] @ n[s]) * (m["v1"] @ n[s] if gated else 1.0)
                y[s] += prob[e] / total * (h @ m["w2"])
        x = x + y + t[p + "mlp.moe.experts.bias"]
    out = t["embedding.word_embeddings.weight"]
    return layer_norm(x, t, "encoder.final_layernorm") @ out.T
