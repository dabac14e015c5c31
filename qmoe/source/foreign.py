"""Checkpoints that look like one of transformers and are not: each is named in one sentence."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qmoe.errors import SourceError

ADAPTER = "adapter_config.json"
MISTRAL = re.compile(r"consolidated(\.\d+|-\d+-of-\d+)?\.(safetensors|pth)")
# What programs put in front of every name when they save the wrapper instead of the model
WRAPPERS = {
    "module": "DataParallel or DistributedDataParallel",
    "_orig_mod": "torch.compile",
    "base_model.model": "a PEFT adapter",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_forward_module": "Lightning Fabric",
}
# levels inside of names that the same programs leave there
INSIDE = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "lora_A": "a LoRA adapter that is not merged",
    "base_layer": "a PEFT adapter that is not merged",
}


def refuse_foreign(directory: Path, files: Iterable[str]) -> None:
    """Refuses an adapter, and weights in Mistral's own layout alone.

    Args:
        directory: holds the configuration files.
        files: names of all files at the top level.

    Raises:
        SourceError: it is one of these; what to do is said.
    """
    files = set(files)
    whole = any(f.startswith(("model.", "model-", "pytorch_model")) for f in files)
    if ADAPTER in files:
        base = _read(directory / ADAPTER).get("base_model_name_or_path")
        of = f" of {base}" if isinstance(base, str) and base else ""
        beside = (
            "beside other weights: transformers would load the base model and apply it. Remove "
            f"{ADAPTER} and the adapter's weights if they are merged already, or else merge them"
            if whole
            else "alone: merge it into its base model first"
        )
        raise SourceError(
            f"{directory} holds a PEFT adapter{of} ({ADAPTER}) {beside} "
            "(PeftModel.merge_and_unload, then save_pretrained)"
        )
    own = sorted(f for f in files if MISTRAL.fullmatch(f))
    named = _read(directory / "config.json").get("transformers_weights")
    if (
        own
        and named is None
        and not any(f.startswith(("model", "pytorch_model")) and "." in f for f in files)
    ):
        raise SourceError(
            f"{directory} holds {own[0]}, weights under Mistral's own names, and none for "
            "transformers; get the files model*.safetensors and config.json of the same model, or "
            "convert it with transformers' conversion script"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def refuse_wrapped(names: Iterable[str], where: str) -> None:
    """Refuses tensors under the names that a training wrapper gave them.

    Args:
        names: of all tensors.
        where: for the message.

    Raises:
        SourceError: with one name and the wrapper.
    """
    names = list(names)
    for prefix, wrapper in WRAPPERS.items():
        if names and all(n.startswith(f"{prefix}.") for n in names):
            raise SourceError(
                f"{where}: every tensor's name begins with {prefix!r} ({names[0]!r}): the state of "
                f"{wrapper} was saved and not that of the model inside; save the model itself "
                "with save_pretrained"
            )
    for name in names:
        for level in set(name.split(".")) & set(INSIDE):
            raise SourceError(
                f"{where}: the name {name!r} has a level {level!r} of {INSIDE[level]}; save the "
                "plain model with save_pretrained"
            )
