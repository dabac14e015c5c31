"""Which transformers configuration, class, lists of blocks and tokenizer belong to a checkpoint.

Knows nothing about weights.
"""

import json
import re
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, GenerationMixin

from qmoe.errors import SourceError, UnsupportedModelError, reason
from qmoe.models.auto import auto_class, building
from qmoe.models.auto import model_class as known_class
from qmoe.models.families.aliases import ALIASES
from qmoe.source.checkpoint import Checkpoint

_COUNTS = re.compile(r".*(layers|experts|depth)")  # settings: how many modules there are
_MANY = 4096  # of them may share a tensor
_NOT_SETTINGS = ("model_type", "auto_map")


def read_config(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """The transformers configuration of a checkpoint, without its `quantization_config`.

    Raises:
        UnsupportedModelError: a model type that transformers does not know, or that brings code
            which is not to be run.
    """
    kind = checkpoint.config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise SourceError(
            f"{checkpoint.directory}: config.json has the model_type {kind!r}, which is no text"
        )
    if (
        "auto_map" in checkpoint.config
        and kind not in transformers.CONFIG_MAPPING
        and kind not in ALIASES
        and not trust_remote_code
    ):
        raise UnsupportedModelError(
            f"{checkpoint.directory}: model type {kind!r} brings its own code; "
            "read it, then pass --trust-remote-code to run it"
        )
    _check_counts(checkpoint, checkpoint.config)
    known = kind in transformers.CONFIG_MAPPING or kind in ALIASES
    try:
        with building(checkpoint.directory):
            config = _read(checkpoint, kind, trust_remote_code)
    except SourceError as error:
        if known:
            raise
        raise UnsupportedModelError(
            f"{checkpoint.directory}: model type {kind!r} is not known to "
            f"transformers {transformers.__version__}"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # the checkpoint presents dense tensors
    return config


def _check_counts(checkpoint: Checkpoint, config: dict[str, Any]) -> None:
    """Refuses more layers or experts than the checkpoint can have tensors for: building the model
    would take for ever."""
    most = _MANY + len(checkpoint.names())
    for name, value in config.items():
        if isinstance(value, dict):
            _check_counts(checkpoint, value)
        elif isinstance(value, int | float) and _COUNTS.fullmatch(name) and value > most:
            raise SourceError(
                f"{checkpoint.directory}: config.json has {name} = {value}, but the checkpoint has "
                f"{len(checkpoint.names())} tensors"
            )


def _read(checkpoint: Checkpoint, kind: str | None, trust_remote_code: bool) -> Any:
    if kind not in ALIASES:
        return AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=trust_remote_code)
    given = {k: v for k, v in checkpoint.config.items() if k not in _NOT_SETTINGS}
    return AutoConfig.for_model(ALIASES[kind], **given)


def model_class(config: Any, checkpoint: Checkpoint, trust_remote_code: bool) -> tuple[Any, Any]:
    """The class of the model, its own code included if that is trusted, and the configuration to
    build it from; see `qmoe.models.auto.model_class`.

    Raises:
        UnsupportedModelError: there is none, or it generates no text.
    """
    cls, config = known_class(config)
    if cls is None and trust_remote_code and "auto_map" in checkpoint.config:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        name = checkpoint.config["auto_map"].get(auto_class(config).__name__)
        if name is not None:
            cls = get_class_from_dynamic_module(name, str(checkpoint.directory))
    pipeline = cls is not None and cls.forward is nn.Module.forward  # of several models
    if cls is None or pipeline or not issubclass(cls, GenerationMixin):
        raise UnsupportedModelError(
            f"{checkpoint.directory}: architecture {config.architectures or None} is not a "
            f"language model that transformers {transformers.__version__} can build"
        )
    return cls, config


def block_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The module lists whose members are all of a type that the model declares as not to be split:
    its blocks.

    Returns:
        (module path, list) in definition order.

    Raises:
        UnsupportedModelError: the model has none.
    """
    kinds = set(model._no_split_modules or [])  # type: ignore[arg-type]
    found = [
        (n, m)
        for n, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) and all(type(b).__name__ in kinds for b in m)
    ]
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__}: no list of blocks of the types {sorted(kinds)}; "
            "this layout is not supported"
        )
    return found


def embeddings(model: Any) -> int:
    """How many tokens a model takes: the rows of its input embeddings."""
    return int(model.get_input_embeddings().weight.shape[0])


def vocabulary(model: Any) -> int:
    """How many tokens a model tells apart: its logits."""
    head = model.get_output_embeddings()
    return embeddings(model) if head is None else int(head.weight.shape[0])


def read_tokenizer(directory: str | Path, trust_remote_code: bool) -> Any:
    """A checkpoint's tokenizer.

    Args:
        directory: or hub id.
        trust_remote_code: run code that it brings along.

    Raises:
        SourceError: there is none, or it cannot be read.
    """
    try:
        found = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
        if not set(found.get_vocab().values()) - set(found.all_special_ids):
            raise ValueError(
                "it holds no vocabulary"
            )  # made of the model's type, for want of files
        return found
    except Exception as e:  # tokenizers raises nothing more special
        hint = "" if trust_remote_code else "; if it needs code of its own, --trust-remote-code"
        raise SourceError(f"{directory}: no tokenizer can be read ({reason(e)}){hint}") from e


def check_generation(directory: str | Path) -> None:
    """Refuses a generation_config.json with which transformers loads no model; one that it passes
    over, or none, is no error.

    Raises:
        SourceError: with what transformers says.
    """
    try:
        GenerationConfig.from_pretrained(directory)
    except OSError:
        return
    except Exception as e:  # whatever its values lead to
        raise SourceError(
            f"{directory}/generation_config.json cannot be used ({reason(e)}); correct it, or "
            "remove it for the defaults of transformers"
        ) from e


def plain_config(config: Any) -> dict[str, Any]:
    """A transformers config as the JSON values of its file."""
    out: dict[str, Any] = json.loads(config.to_json_string())
    return out
