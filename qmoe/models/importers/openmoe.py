"""OpenMoE checkpoints (safetensors or .bin with a Llama-like config) -> model type ``openmoe``.

The published files hold, in sparse layers, ``mlp.gate_weight`` [E, H], ``mlp.experts.wi_gate`` [E,
H, 2 I], ``wi_up`` [E, H, I] and ``wo`` [E, I, H] (inputs first: transposed here),
``pre_extra_mlp_layernorm`` and ``extra_mlp``; in all others a gated network whose ``gate_proj`` has
2 I rows. Config values of Llama keep their names; those of the experts are ``num_experts``,
``moe_layer_interval`` and ``router_topk``. The tokenizer, UMT5's, is copied if it lies beside.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from qmoe.errors import SourceError
from qmoe.models.importers.writing import Imported, Part, write_model
from qmoe.models.projects.openmoe import OpenMoeConfig
from qmoe.source.checkpoint import Checkpoint, open_checkpoint

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "generation_config.json",
)
KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "bos_token_id",
    "eos_token_id", "pad_token_id", "num_experts", "moe_layer_interval",
)  # fmt: skip
NOTE = "router capacity is a matter of training: at inference no token is dropped"


def import_openmoe(source: str | Path, destination: str | Path) -> Imported:
    """Convert an OpenMoE checkpoint.

    Args:
        source: local directory or hub id.
        destination: directory to create.

    Raises:
        SourceError: the config or the tensors are not OpenMoE's.
        OutputError: the destination exists or cannot be written.
    """
    ck = open_checkpoint(source)
    config = _config(ck)

    def tokenizer(directory: Path) -> None:
        for name in TOKENIZER:
            if (ck.directory / name).is_file():
                shutil.copyfile(ck.directory / name, directory / name)

    parts, stored = _parts(ck, config), set(ck.names())
    return write_model(destination, config, parts, stored, set(), (NOTE,), tokenizer)


def _config(ck: Checkpoint) -> OpenMoeConfig:
    c = ck.config
    absent = [k for k in ("num_experts", "moe_layer_interval", "intermediate_size") if k not in c]
    if absent:
        raise SourceError(
            f"{ck.directory}/config.json has no {absent[0]!r}; this is no OpenMoE checkpoint"
        )
    if c.get("hidden_act") != "swiglu" or not c.get("mlp_gated", True):
        raise SourceError(
            f"OpenMoE with hidden_act={c.get('hidden_act')!r}, "
            f"mlp_gated={c.get('mlp_gated', True)!r} is not supported (expected 'swiglu', true)"
        )
    return OpenMoeConfig(
        **{k: c[k] for k in KEPT if k in c},
        num_experts_per_tok=c.get("router_topk", 2),
        norm_topk_prob=bool(c.get("router_norm", False)),
        tie_word_embeddings=False,
        dtype=c.get("dtype") or c.get("torch_dtype"),
        architectures=["OpenMoeForCausalLM"],
    )


def _parts(ck: Checkpoint, config: OpenMoeConfig) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for name in ck.names():
        if m := re.fullmatch(r"(.*\.)(mlp|extra_mlp)\.gate_proj\.weight", name):
            names = [f"{m[1]}{m[2]}.{p}_proj.weight" for p in ("gate", "up")]
            parts[f"{m[1]}{m[2]}.gate_up_proj.weight"] = _rows(ck, names)
        elif re.search(r"mlp\.up_proj\.weight$|\.experts\.wi_up$", name):
            continue  # went with its gate
        elif name.endswith(".mlp.gate_weight"):
            parts[name.removesuffix("gate_weight") + "router.weight"] = _rows(ck, [name])
        elif name.endswith(".experts.wi_gate"):
            stem = name.removesuffix("wi_gate")
            parts[stem + "gate_up_proj"] = _experts(ck, [name, stem + "wi_up"])
        elif name.endswith(".experts.wo"):
            parts[name.removesuffix("wo") + "down_proj"] = _experts(ck, [name])
        else:
            parts[name] = _rows(ck, [name])
    return parts


def _rows(ck: Checkpoint, names: list[str]) -> Part:
    """Matrices on top of each other."""
    shape = (sum(ck.shape(n)[0] for n in names), *ck.shape(names[0])[1:])
    return Part(shape, ck.dtype(names[0]), lambda: map(ck.read, names), tuple(names))


def _experts(ck: Checkpoint, names: list[str]) -> Part:
    """Stacks [E, in, out_k] -> [E, sum of out_k, in], one expert at a time."""
    shapes = [ck.shape(n) for n in names]
    if any(len(s) != 3 or s[:2] != shapes[0][:2] for s in shapes):
        raise SourceError(f"{', '.join(names)} have shapes {shapes}, expected [experts, in, out]")
    e, inputs, _ = shapes[0]

    def pieces() -> Iterator[Tensor]:
        for i in range(e):
            yield torch.cat([ck.read(n, i).T for n in names])

    return Part((e, sum(s[2] for s in shapes), inputs), ck.dtype(names[0]), pieces, tuple(names))
