"""fairseq ``moe_lm`` checkpoints -> model type ``fairseq_moe``.

A directory with ``NAME-shared.pt`` (everything but the experts, and the settings) and one
``NAME-rank-R.pt`` per rank, whose ``moe_layer.experts.J`` is expert R * (experts per rank) + J.
Layer names lie under ``decoder.``. With dict.txt and GPT-2's vocabulary beside them the tokenizer
is written too. Texts begin with ``</s>``, or with ``<s>`` where the task's add_bos_token is set
(fairseq's LanguageModelingTask.build_dataset_for_inference).
"""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from qmoe.errors import SourceError
from qmoe.models.importers.gpt2_bpe import SPECIAL, read_tokenizer
from qmoe.models.importers.pickles import load_pickle, settings_of
from qmoe.models.importers.writing import Imported, Part, whole, write_model
from qmoe.models.projects.fairseq_moe import FairseqMoeConfig

IGNORED = r"decoder\.version|decoder\.embed_positions\._float_tensor"
EXPERT = r"decoder\.layers\.(\d+)\.moe_layer\.experts\.(\d+)\.(fc[12])\.(weight|bias)"
NAMES = {
    "fc1.weight": "up_proj",
    "fc1.bias": "up_proj_bias",
    "fc2.weight": "down_proj",
    "fc2.bias": "down_proj_bias",
}
ACTIVATIONS = {"gelu": "gelu", "gelu_accurate": "gelu_new", "gelu_fast": "gelu_new", "relu": "relu"}
NOTES = (
    "the second expert of a token is its second most probable one, and no token is dropped: "
    "sampling and capacity are for training",
)
NO_TOKENIZER = (
    "no tokenizer was written: put dict.txt and GPT-2's encoder.json and vocab.bpe (or vocab.json "
    "and merges.txt) beside the weights and import again"
)
OPEN_RANKS = 8
SPLIT = r"(-shard|_part)\d+\.pt$"


def import_fairseq(source: str | Path, destination: str | Path) -> Imported:
    """Convert a fairseq ``moe_lm`` checkpoint.

    Args:
        source: directory with the shared file and the rank files.
        destination: directory to create.

    Raises:
        SourceError: files are missing, or settings or tensors are not of this layout.
        OutputError: the destination exists or cannot be written.
    """
    shared_path, ranks = _files(Path(source))
    shared = load_pickle(shared_path)
    dense = _tensors(shared, shared_path)
    load = lru_cache(OPEN_RANKS)(lambda r: _tensors(load_pickle(ranks[r]), ranks[r]))
    config = _config(shared, dense, load(0), len(ranks), str(shared_path))
    parts, stored = _parts(config, dense, load, len(ranks))
    ignored = {n for n in dense if re.fullmatch(IGNORED, n)}
    if config.tie_word_embeddings:
        ignored.add("decoder.output_projection.weight")
    tokenizer = read_tokenizer(Path(source), config.vocab_size, SPECIAL[config.bos_token_id])
    if tokenizer is None:
        return write_model(destination, config, parts, stored, ignored, (*NOTES, NO_TOKENIZER))
    put = tokenizer.save_pretrained
    return write_model(destination, config, parts, stored, ignored, NOTES, put)


def _files(directory: Path) -> tuple[Path, list[Path]]:
    shared = sorted(directory.glob("*-shared.pt"))
    split = sorted(p.name for p in directory.glob("*.pt") if re.search(SPLIT, p.name))
    if split and not shared:
        raise SourceError(
            f"{directory} holds {split[0]}, a part of a file that fairseq splits over processes; "
            "merge them first with fairseq's consolidate_fsdp_shards (branch moe)"
        )
    if len(shared) != 1:
        raise SourceError(
            f"{directory} holds {len(shared)} files *-shared.pt, expected one; give the directory "
            "of one checkpoint"
        )
    stem = shared[0].name.removesuffix("shared.pt")
    found = {
        int(m[1]): p
        for p in directory.iterdir()
        if (m := re.fullmatch(re.escape(stem) + r"rank-(\d+)\.pt", p.name))
    }
    missing = sorted(set(range(max(found, default=0) + 1)) - set(found))
    if missing:
        raise SourceError(
            f"{directory / f'{stem}rank-{missing[0]}.pt'} is missing ({len(found)} rank files are "
            "there); download it"
        )
    return shared[0], [found[i] for i in range(len(found))]


def _tensors(state: dict[str, Any], path: Path) -> dict[str, Tensor]:
    model = state.get("model")
    if not isinstance(model, dict) or not all(isinstance(v, Tensor) for v in model.values()):
        raise SourceError(f"{path} holds no 'model' with tensors; this is no fairseq checkpoint")
    return model


_EXPECTED = {
    "decoder_learned_pos": False,
    "no_token_positional_embeddings": False,
    "decoder_normalize_before": True,
    "adaptive_softmax_cutoff": None,
    "alternate_decoder_ffn_embed_dim": 0,  # dense layers of that width where experts would be
    "layernorm_embedding": False,
}


def _config(
    shared: dict[str, Any],
    dense: dict[str, Tensor],
    first: dict[str, Tensor],
    ranks: int,
    path: str,
) -> FairseqMoeConfig:
    cfg = settings_of(shared.get("cfg"))
    a = settings_of(cfg.get("model")) or settings_of(shared.get("args"))
    for key, value in _EXPECTED.items():
        if key in a and (a[key] or None) != (value or None):
            raise SourceError(f"{path}: {key}={a[key]!r} is not supported (expected {value!r})")
    if "decoder_attention_heads" not in a:
        raise SourceError(
            f"{path} has no setting 'decoder_attention_heads'; this is no fairseq language model"
        )
    if a.get("activation_fn", "gelu") not in ACTIVATIONS:
        raise SourceError(
            f"{path}: activation {a['activation_fn']!r} is not supported (known: "
            f"{', '.join(ACTIVATIONS)})"
        )
    embedding = "decoder.embed_tokens.weight"
    layers = {int(m[1]) for n in dense if (m := re.match(r"decoder\.layers\.(\d+)\.", n))}
    experts = [m for n in first if (m := re.fullmatch(EXPERT, n))]
    if embedding not in dense or not experts or not layers:
        raise SourceError(
            f"{path} and its rank files hold no {embedding!r} or no 'moe_layer.experts'; this is "
            "no moe_lm checkpoint"
        )
    local = 1 + max(int(m[2]) for m in experts)
    width = next(t.shape[0] for n, t in first.items() if n.endswith("fc1.weight"))
    output = dense.get("decoder.output_projection.weight")
    top1 = bool(a.get("moe_top1_expert", False))
    task = settings_of(cfg.get("task")) or a
    return FairseqMoeConfig(
        vocab_size=dense[embedding].shape[0],
        d_model=dense[embedding].shape[1],
        ffn_dim=width,
        num_layers=max(layers) + 1,
        attention_heads=a["decoder_attention_heads"],
        bos_token_id=SPECIAL.index("<s>" if task.get("add_bos_token") else "</s>"),
        activation_function=ACTIVATIONS[a.get("activation_fn", "gelu")],
        max_position_embeddings=a.get("max_target_positions") or a.get("tokens_per_sample") or 2048,
        scale_embedding=not a.get("no_scale_embedding", False),
        tie_word_embeddings=bool(a.get("share_decoder_input_output_embed", output is None)),
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        num_experts=ranks * local,
        num_experts_per_tok=1 if top1 else 2,
        norm_topk_prob=not top1,
        sparse_layers=sorted({int(m[1]) for m in experts}),
        dtype=dense[embedding].dtype,
        architectures=["FairseqMoeForCausalLM"],
    )


def _parts(
    config: FairseqMoeConfig,
    dense: dict[str, Tensor],
    load: Callable[[int], dict[str, Tensor]],
    ranks: int,
) -> tuple[dict[str, Part], set[str]]:
    parts: dict[str, Part] = {}
    stored = set(dense)
    for name, value in dense.items():
        if re.fullmatch(IGNORED, name):
            continue
        if name == "decoder.output_projection.weight":
            if config.tie_word_embeddings:
                continue
            new = "lm_head.weight"
        else:
            new = "model." + name.removeprefix("decoder.").replace(
                ".moe_layer.gate.wg.", ".moe.router."
            )

        parts[new] = whole(value, name)
    local = config.num_experts // ranks
    first = load(0)
    for name, value in sorted(first.items()):
        m = re.fullmatch(EXPERT, name)
        if m is None:
            if name not in dense and not re.fullmatch(IGNORED, name):
                stored.add(name)  # belongs nowhere: reported by the writer
            continue
        stored.add(name)
        if m[2] != "0":
            continue
        kind = f"{m[3]}.{m[4]}"
        names = tuple(f"decoder.layers.{m[1]}.moe_layer.experts.{j}.{kind}" for j in range(local))

        def pieces(
            names: tuple[str, ...] = names, shape: tuple[int, ...] = tuple(value.shape)
        ) -> Iterator[Tensor]:
            for rank in range(ranks):
                tensors = load(rank)
                for n in names:
                    if n not in tensors or tuple(tensors[n].shape) != shape:
                        got = list(tensors[n].shape) if n in tensors else "missing"
                        raise SourceError(
                            f"rank {rank}: {n!r} is {got}, but rank 0 has {list(shape)}; the "
                            "files do not belong together"
                        )
                    yield tensors[n]

        parts[f"model.layers.{m[1]}.moe.experts.{NAMES[kind]}"] = Part(
            (config.num_experts, *value.shape), value.dtype, pieces, names
        )
    return parts, stored
