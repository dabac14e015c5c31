"""Imported checkpoints against the layer equations, written here on the source's own tensors."""

import json
import math
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qmoe.errors import OutputError, SourceError
from qmoe.importers import IMPORTERS, writing

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


def megablocks_source(d, seed=0, gated=False, ranks=1, dense=(), **changes):
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
        s |= {p + "mlp.router.layer.weight": (E, H), p + "mlp.experts.bias": (H,)}
        names = ("w1", "v1", "w2") if gated else ("w1", "w2")
        s |= {p + f"mlp.experts.mlp.{n}": (E * I, H) for n in names}
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
        torch.save(state, rank / "model_optim_rng.pt")
    (d / "latest_checkpointed_iteration.txt").write_text("70\n")
    return t, a, gated


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
            prob = (t[p + "mlp.router.layer.weight"] @ n[s]).softmax(0)
            top = prob.topk(a["moe_top_k"])
            norm = a["moe_normalize_expert_weights"]
            total = 1.0 if norm is None else top.values.abs().pow(norm).sum() ** (1 / norm)
            for e in top.indices.tolist():
                m = {
                    k: t[p + f"mlp.experts.mlp.{k}"].view(E, I, H)[e]
                    for k in (("w1", "v1", "w2") if gated else ("w1", "w2"))
                }
                h = gelu(m["w1"] @ n[s]) * (m["v1"] @ n[s] if gated else 1.0)
                y[s] += prob[e] / total * (h @ m["w2"])
        x = x + y + t[p + "mlp.experts.bias"]
    out = t["embedding.word_embeddings.weight"]
    return layer_norm(x, t, "encoder.final_layernorm") @ out.T


CASES = {
    "openmoe": ("openmoe", openmoe_source, openmoe_equations, {}),
    "fairseq": ("fairseq", fairseq_source, fairseq_equations, {}),
    "fairseq top-1": ("fairseq", fairseq_source, fairseq_equations, {"moe_top1_expert": True}),
    "megablocks": ("megablocks", megablocks_source, megablocks_equations, {}),
    "megablocks gated, ranks": (
        "megablocks",
        megablocks_source,
        megablocks_equations,
        {"gated": True, "ranks": 2, "moe_normalize_expert_weights": 2.0, "dense": (1,)},
    ),
    "megablocks top-1": ("megablocks", megablocks_source, megablocks_equations, {"moe_top_k": 1}),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_import_follows_the_equations(tmp_path, case):
    kind, write, equations, options = CASES[case]
    source = write(tmp_path / "src", **options)
    done = IMPORTERS[kind](tmp_path / "src", tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(done.directory, output_loading_info=True)
    assert not any(info.values()), info
    assert done.parameters == sum(p.numel() for p in model.parameters())
    ids = torch.tensor([3, 17, 9, 9, 41, 5, 30, 22])
    expected = equations(source, ids)
    for implementation in ("eager", "grouped_mm"):
        model.set_experts_implementation(implementation)
        got = model.eval()(ids[None]).logits[0]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    new = model.generate(ids[None], max_new_tokens=3, do_sample=False, pad_token_id=0)[0]
    assert int(new[8]) == int(expected[-1].argmax())  # generation goes through the cache
    assert int(new[9]) == int(equations(source, new[:9])[-1].argmax())
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(again(ids[None]).logits[0], expected, rtol=1e-4, atol=1e-4)
    saved = model.state_dict()
    assert all(torch.equal(v, saved[k]) for k, v in again.state_dict().items())


def test_files_beside_the_weights(tmp_path):
    openmoe_source(tmp_path / "src")
    done = IMPORTERS["openmoe"](tmp_path / "src", tmp_path / "out")
    names = {p.name for p in done.directory.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer_config.json"}
    assert sorted(load_file(tmp_path / "src" / "model.safetensors")) == sorted(done.used)
    assert not (tmp_path / "out.partial").exists()


def test_bounded_shards(tmp_path, monkeypatch):
    _, ranks, _ = fairseq_source(tmp_path / "src")
    monkeypatch.setattr(writing, "SHARD_BYTES", 30_000)
    done = IMPORTERS["fairseq"](tmp_path / "src", tmp_path / "out")
    files = sorted(done.directory.glob("model-*.safetensors"))
    assert len(files) > 3
    assert max(f.stat().st_size for f in files) < 40_000
    assert done.ignored == ("decoder.version",)
    stack = [r["decoder.layers.1.moe_layer.experts.1.fc2.weight"] for r in ranks]
    tensors = {k: v for f in files for k, v in load_file(f).items()}
    assert torch.equal(tensors["model.layers.1.moe.experts.down_proj"][1::2], torch.stack(stack))


def _replace(path, change):
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


def test_fairseq_bad_sources(tmp_path):
    run = IMPORTERS["fairseq"]
    with pytest.raises(SourceError, match=r"0 files \*-shared.pt"):
        run(tmp_path, tmp_path / "out")
    d = tmp_path / "src"
    for options, words in (
        ({"decoder_learned_pos": True}, "decoder_learned_pos=True is not supported"),
        ({"activation_fn": "swish"}, "activation 'swish'"),
    ):
        fairseq_source(d, **options)
        with pytest.raises(SourceError, match=words):
            run(d, tmp_path / "out")
    fairseq_source(d)
    _replace(d / "model-shared.pt", lambda s: s["model"].update({"decoder.x": torch.ones(1)}))
    with pytest.raises(SourceError, match=r"'decoder.x' has no place"):
        run(d, tmp_path / "out")
    fairseq_source(d)
    name = "decoder.layers.3.moe_layer.experts.1.fc1.weight"
    _replace(d / "model-rank-1.pt", lambda s: s["model"].pop(name))
    with pytest.raises(SourceError, match=f"rank 1: '{name}' is missing"):
        run(d, tmp_path / "out")
    (d / "model-rank-1.pt").rename(d / "model-rank-2.pt")
    with pytest.raises(SourceError, match=r"model-rank-1.pt is missing"):
        run(d, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_openmoe_bad_sources(tmp_path):
    run, d = IMPORTERS["openmoe"], tmp_path / "src"
    t = openmoe_source(d)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists"):
        run(d, tmp_path / "out")
    save_file({**t, "model.layers.0.odd": torch.ones(2)}, d / "model.safetensors")
    with pytest.raises(SourceError, match=r"model.layers.0.odd' has no place"):
        run(d, tmp_path / "new")
    t.pop("model.norm.weight")
    save_file(t, d / "model.safetensors")
    with pytest.raises(SourceError, match=r"nothing for model.norm.weight \[32\]"):
        run(d, tmp_path / "new")
    openmoe_source(d, hidden_act="gelu")
    with pytest.raises(SourceError, match="hidden_act='gelu'"):
        run(d, tmp_path / "new")
    openmoe_source(d, num_experts=6)
    with pytest.raises(SourceError, match=r"\[4, .*the model needs \[6, "):
        run(d, tmp_path / "new")
    (d / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SourceError, match="no OpenMoE checkpoint"):
        run(d, tmp_path / "new")


def test_megablocks_bad_sources(tmp_path):
    run = IMPORTERS["megablocks"]
    for i, (options, words) in enumerate(
        (
            ({"position_embedding_type": "rope"}, "position_embedding_type='rope'"),
            ({"moe_num_experts": None}, "no setting 'moe_num_experts'"),
            ({"moe_num_experts": 8}, "hold 4 of 8 experts"),
            ({"ffn_hidden_size": 20}, r"expected \[experts \* 20, 32\]"),
        )
    ):
        megablocks_source(tmp_path / f"src{i}", **options)
        with pytest.raises(SourceError, match=words):
            run(tmp_path / f"src{i}", tmp_path / "out")
    megablocks_source(tmp_path / "src")
    rank = tmp_path / "src" / "iter_0000070" / "mp_rank_00"
    rank.rename(rank.with_name("mp_rank_01"))
    with pytest.raises(SourceError, match="split by tensor or pipeline parallelism"):
        run(tmp_path / "src", tmp_path / "out")
    with pytest.raises(SourceError, match=r"holds no mp_rank_"):
        run(tmp_path, tmp_path / "out")


def test_fairseq_tokenizer(tmp_path):
    d = tmp_path / "src"
    fairseq_source(d)
    vocabulary = {"a": 0, "b": 1, "\u0120": 2, "ab": 3, "\u0120ab": 4, "c": 5}  # \u0120 is a space
    (d / "encoder.json").write_text(json.dumps(vocabulary))
    (d / "vocab.bpe").write_text("#version: 0.2\na b\n\u0120 ab\n", encoding="utf-8")
    keys = ["4", "0", "1", "2", "3", "madeupword0000"]
    (d / "dict.txt").write_text("".join(f"{k} 7\n" for k in keys))
    done = IMPORTERS["fairseq"](d, tmp_path / "out")
    assert not any("tokenizer" in n for n in done.notes)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("ab ab\nba c", add_special_tokens=False).input_ids
    assert ids == [8, 4, 2, 6, 5, 7, 3]
    assert tokenizer.decode(ids[:2]) == "ab ab"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 1, 0)
    (d / "dict.txt").write_text("17 7\n")
    with pytest.raises(SourceError, match="GPT-2 has no token 17"):
        IMPORTERS["fairseq"](d, tmp_path / "new")
    (d / "dict.txt").write_text("".join(f"x{i} 7\n" for i in range(V)))
    with pytest.raises(SourceError, match=f"has {V} tokens, but the model's embedding only {V}"):
        IMPORTERS["fairseq"](d, tmp_path / "new")


NAMES = {"openmoe": "OpenMoE", "fairseq": "fairseq moe_lm", "megablocks": "Megatron, MegaBlocks"}


@pytest.mark.parametrize("kind", NAMES)
def test_imported_then_compressed(tmp_path, tiny, generic, kind, table_row):
    _, write, _, _ = CASES[kind]
    write(tmp_path / "src")
    source = IMPORTERS[kind](tmp_path / "src", tmp_path / "source").directory
    passed = generic.prove(source, tmp_path, tiny, AutoModelForCausalLM, "qmoe", 512)
    config = json.loads((source / "config.json").read_text())
    row = generic.row(f"{NAMES[kind]}, imported", config["model_type"], passed, tmp_path)
    table_row("named", row)
