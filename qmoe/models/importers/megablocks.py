"""Megatron-LM checkpoints with MegaBlocks experts -> model type ``megatron_moe``.

``mp_rank_00/model_optim_rng.pt`` (``model_rng.pt`` under the distributed optimizer; a folder
``mp_rank_00_RRR`` for every expert-parallel rank R) below the directory or its latest ``iter_*``,
with ``args`` and, under ``model.language_model``, ``embedding`` and ``encoder``. Sparse layers hold
``mlp.moe.router.layer.weight`` [E, H], ``mlp.moe.experts.mlp.w1`` and ``w2`` [experts of the rank *
I, H] (and ``v1`` where experts have a gate), ``mlp.moe.experts.bias``; the level ``moe`` is
Megatron-LM's adapter around the layer of MegaBlocks. Queries, keys and values are interleaved per
head: [heads, 3, head width, H].
Checked against Megatron-LM (stanford-futuredata, 85f95ae) with MegaBlocks 78eea65.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmoe.errors import SourceError
from qmoe.models.importers.pickles import load_pickle, settings_of
from qmoe.models.importers.writing import Imported, Part, whole, write_model
from qmoe.models.projects.megatron_moe import MegatronMoeConfig

FILES = ("model_optim_rng.pt", "model_rng.pt")
LAYER = {
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attention.query_key_value": "attn.c_attn",
    "attention.query_key_value": "attn.c_attn",
    "self_attention.dense": "attn.c_proj",
    "attention.dense": "attn.c_proj",
    "mlp.dense_h_to_4h": "mlp.c_fc",
    "mlp.dense_4h_to_h": "mlp.c_proj",
    "mlp.router.layer": "mlp.router",
}
TURNED = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # GPT-2 keeps these [in, out]
NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "moe_num_experts")
NOTES = (
    "no tokenizer was written: give the one that the model was trained with to "
    "AutoTokenizer.save_pretrained",
)
Tree = dict[str, Tensor]


def import_megablocks(source: str | Path, destination: str | Path) -> Imported:
    """Convert a Megatron-LM / MegaBlocks checkpoint without tensor or pipeline parallelism.

    Args:
        source: checkpoint directory, one of its ``iter_*`` directories, or the directory of rank
            folders.
        destination: directory to create.

    Raises:
        SourceError: files are missing, the model is split in ways that are not supported, or
            settings or tensors are not of this layout.
        OutputError: the destination exists or cannot be written.
    """
    paths = _files(Path(source))
    ranks = [load_pickle(p) for p in paths]
    trees = [_flat(r, p) for r, p in zip(ranks, paths, strict=True)]
    config = _config(settings_of(ranks[0].get("args")), trees[0], str(paths[0]))
    parts = _parts(config, trees)
    stored = set().union(*trees)
    ignored = {n for n in stored if n.endswith(("._extra_state", "rotary_emb.inv_freq"))}
    return write_model(destination, config, parts, stored, ignored, NOTES)


def _files(directory: Path) -> list[Path]:
    if (directory / "latest_checkpointed_iteration.txt").is_file():
        step = (directory / "latest_checkpointed_iteration.txt").read_text().strip()
        directory = directory / (
            "release" if step == "release" else f"iter_{int(step):07d}" if step.isdigit() else step
        )
    found = next((f for name in FILES if (f := sorted(directory.glob(f"mp_rank_*/{name}")))), [])
    if not found:
        raise SourceError(
            f"{directory} holds no mp_rank_*/{' or '.join(FILES)}; give a Megatron checkpoint "
            "directory in the 'torch' format"
        )
    odd = [p for p in found if not re.fullmatch(r"mp_rank_00(_\d{3})?", p.parent.name)]
    if odd:
        raise SourceError(
            f"{odd[0].parent.name}: the model is split by tensor or pipeline parallelism; merge "
            "it with Megatron's checkpoint tool first"
        )
    return found


def _flat(state: dict[str, Any], path: Path) -> Tree:
    """Tensors of ``model.language_model`` by dotted name, without levels that only some versions
    have.
    """
    model = state.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("language_model"), dict):
        raise SourceError(
            f"{path} has no model.language_model; this is no Megatron-LM checkpoint of the "
            "supported layout"
        )
    out: Tree = {}

    def walk(prefix: str, node: dict[str, Any]) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                walk(name + ".", value)
            elif isinstance(value, Tensor):
                out[name] = value

    walk("", model["language_model"])
    names = {n: re.sub(r"^transformer\.", "encoder.", n) for n in out}
    return {re.sub(r"(\.\d+\.mlp)\.moe\.", r"\1.", names[n]): t for n, t in out.items()}


_SUPPORTED = {
    "position_embedding_type": (None, "learned_absolute"),
    "normalization": (None, "LayerNorm"),
    "apply_layernorm_1p": (None, False),
    "tensor_model_parallel_size": (None, 1),
    "pipeline_model_parallel_size": (None, 1),
    "group_query_attention": (None, False),
    "swiglu": (None, False),
    "apply_residual_connection_post_layernorm": (None, False),
    "moe_weight_parallelism": (None, False),
    "moe_use_megatron_switch": (None, False),
}


def _config(args: dict[str, Any], tree: Tree, path: str) -> MegatronMoeConfig:
    for key in NEEDED:
        if args.get(key) is None:
            raise SourceError(
                f"{path} has no setting {key!r} in its args; this is no Megatron checkpoint with "
                "MegaBlocks experts"
            )
        if not isinstance(args[key], int) or args[key] < 1:
            raise SourceError(f"{path}: {key}={args[key]!r}, expected a positive integer")
    if args.get("moe_capacity_factor"):
        raise SourceError(
            f"{path}: moe_capacity_factor={args['moe_capacity_factor']!r}: these experts drop the "
            "tokens over their capacity, which no model class here does; only dropless experts "
            "(capacity factor 0) are supported"
        )
    for key, fine in _SUPPORTED.items():
        if args.get(key) not in fine:
            raise SourceError(
                f"{path}: {key}={args[key]!r} is not supported (expected {fine[1]!r})"
            )
    sparse = sorted(
        {int(m[1]) for n in tree if (m := re.match(r"encoder\.layers\.(\d+)\.mlp\.experts\.", n))}
    )
    vocabulary = tree.get("embedding.word_embeddings.weight")
    positions = tree.get("embedding.position_embeddings.weight")
    if not sparse or vocabulary is None or positions is None:
        raise SourceError(
            f"{path} holds no experts or no word and position embeddings; this layout is not "
            "supported"
        )
    tanh = args.get("bias_gelu_fusion", True) or args.get("openai_gelu")
    return MegatronMoeConfig(
        vocab_size=vocabulary.shape[0],
        n_embd=args["hidden_size"],
        n_layer=args["num_layers"],
        n_head=args["num_attention_heads"],
        n_inner=args.get("ffn_hidden_size") or 4 * args["hidden_size"],
        n_positions=positions.shape[0],
        layer_norm_epsilon=args.get("layernorm_epsilon", 1e-5),
        activation_function="gelu_pytorch_tanh" if tanh else "gelu",  # of dense layers
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings="output_layer.weight" not in tree,
        num_experts=args["moe_num_experts"],
        num_experts_per_tok=args.get("moe_top_k", 1),
        router_norm=args.get("moe_normalize_expert_weights") or None,  # 0 is off, too
        sparse_layers=sparse,
        gated=any(n.endswith(".mlp.v1") for n in tree),
        expert_bias=any(n.endswith(".mlp.experts.bias") for n in tree),
        dtype=vocabulary.dtype,
        architectures=["MegatronMoeForCausalLM"],
    )


def _parts(config: MegatronMoeConfig, trees: list[Tree]) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for name, value in trees[0].items():
        if m := re.fullmatch(r"encoder\.layers\.(\d+)\.mlp\.experts\.mlp\.(w1|v1|w2)", name):
            if m[2] == "w2":
                parts[f"transformer.h.{m[1]}.mlp.experts.down_proj"] = _experts(
                    config, trees, (name,), turned=True
                )
            elif m[2] == "w1":
                names = (name, name.removesuffix("w1") + "v1") if config.gated else (name,)
                first = "gate_up_proj" if config.gated else "up_proj"
                parts[f"transformer.h.{m[1]}.mlp.experts.{first}"] = _experts(
                    config, trees, names, turned=False
                )
            continue
        new = _rename(name)
        if new is None:
            continue  # belongs nowhere: reported by the writer
        if new.endswith("attn.c_attn.weight") or new.endswith("attn.c_attn.bias"):
            value = _separate(config, value, name)
        if new.endswith(".weight") and new.rsplit(".", 1)[0].endswith(TURNED):
            value = value.T
        if new.endswith("mlp.bias"):
            value = value.reshape(-1)

        parts[new] = whole(value, name)
    return parts


def _rename(name: str) -> str | None:
    fixed = {
        "embedding.word_embeddings.weight": "transformer.wte.weight",
        "embedding.position_embeddings.weight": "transformer.wpe.weight",
        "encoder.final_layernorm.weight": "transformer.ln_f.weight",
        "encoder.final_layernorm.bias": "transformer.ln_f.bias",
        "output_layer.weight": "lm_head.weight",
    }
    if name in fixed:
        return fixed[name]
    m = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if m is None:
        return None
    if m[2] == "mlp.experts":
        return f"transformer.h.{m[1]}.mlp.{m[3]}"
    return f"transformer.h.{m[1]}.{LAYER[m[2]]}.{m[3]}" if m[2] in LAYER else None


def _separate(config: MegatronMoeConfig, value: Tensor, name: str) -> Tensor:
    """[heads * 3 * width, …] -> [3 * heads * width, …]: all queries, all keys, all values."""
    if value.shape[0] != 3 * config.n_embd:
        raise SourceError(
            f"{name!r} has {value.shape[0]} rows, expected {3 * config.n_embd}: the heads' width "
            "is not hidden / heads"
        )
    rest = value.shape[1:]
    return value.view(config.n_head, 3, -1, *rest).transpose(0, 1).reshape(-1, *rest)


def _experts(
    config: MegatronMoeConfig, trees: list[Tree], names: tuple[str, ...], turned: bool
) -> Part:
    """Matrices [experts of the rank * I, H] of all ranks -> [E, rows, cols], one expert at a
    time.
    """
    inner, hidden = int(config.n_inner or 0), int(config.n_embd)
    counts = []
    for r, tree in enumerate(trees):
        if tree[names[0]].ndim == 3:
            raise SourceError(
                f"{names[0]!r} has the shape {list(tree[names[0]].shape)}: experts with a "
                "capacity, which drop tokens; only dropless experts ([experts * width, hidden]) "
                "are supported"
            )
        shapes = {n: list(tree[n].shape) if n in tree else None for n in names}
        if any(
            s is None or s[0] % inner or s[1:] != [hidden] or s != shapes[names[0]]
            for s in shapes.values()
        ):
            raise SourceError(f"rank {r}: {shapes}, expected [experts * {inner}, {hidden}]")
        counts.append(tree[names[0]].shape[0] // inner)
    if sum(counts) != config.num_experts:
        raise SourceError(
            f"{names[0]!r}: the {len(trees)} rank folders hold {sum(counts)} of "
            f"{config.num_experts} experts; give all of them"
        )

    def pieces() -> Iterator[Tensor]:
        for tree, count in zip(trees, counts, strict=True):
            for e in range(count):
                rows = torch.cat([tree[n][e * inner : (e + 1) * inner] for n in names])
                yield rows.T if turned else rows

    shape = (hidden, inner) if turned else (inner * len(names), hidden)
    return Part((config.num_experts, *shape), trees[0][names[0]].dtype, pieces, names)
