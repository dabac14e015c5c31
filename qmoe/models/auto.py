"""Which class of transformers a configuration stands for: one rule for compressing and for loading.

The class that config.json names under `architectures` decides, as its publisher meant it: Llama 4
and Qwen3.5-MoE have a text-only class and one with a vision tower, and their tensors bear other
names in each. Only where none is named, one that belongs to another type of configuration, or the
body without a head, do transformers' Auto classes decide.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationMixin

from qmoe.errors import QmoeError, SourceError

# What transformers raises on a config that it cannot build a model from.
_BAD_CONFIG = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)

# in this order: a type with a text-only and a multimodal class is the text-only one
_TEXT = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


def auto_class(config: Any) -> Any:
    """The Auto class for a configuration: the one that builds its `model_class`, or else the causal
    one, for types that transformers does not list (their code comes with the checkpoint).
    """
    named = _named(config)
    fitting = [a for a in _autos(config) if type(config) in a._model_mapping]
    for auto in fitting:
        if auto._model_mapping[type(config)] is named:
            return auto
    return fitting[0] if fitting else _autos(config)[0]


def model_class(config: Any) -> tuple[Any, Any]:
    """The model class that a configuration stands for.

    Args:
        config: of a checkpoint.

    Returns:
        (class, the configuration to build it from: the text part for a text-only class of a
        composite type); (None, config) if transformers itself has none.
    """
    cls = _named(config)
    if cls is None:
        auto = auto_class(config)
        if type(config) not in auto._model_mapping:
            return None, config
        cls = auto._model_mapping[type(config)]
    text = config.sub_configs.get("text_config")
    if text is not None and cls.config_class is text:
        names = config.architectures
        config = config.get_text_config()
        config.architectures = names
    return cls, config


def foreign_name(config: Any) -> bool:
    """Whether `architectures` names a class that transformers does not have, such as Phi-3.5-MoE's
    PhiMoEForCausalLM: the publisher's name, by which other engines know the model."""
    name = _name(config)
    return name is not None and not hasattr(transformers, name)


def _name(config: Any) -> str | None:
    """The first under `architectures`."""
    names = config.architectures
    first = names[0] if isinstance(names, list | tuple) and names else None
    return first if isinstance(first, str) else None


def _autos(config: Any) -> list[Any]:
    if config.is_encoder_decoder:
        return [transformers.AutoModelForSeq2SeqLM]
    return [getattr(transformers, name) for name in _TEXT]


def _named(config: Any) -> Any:
    """The first class under `architectures` that transformers has, that is for such a
    configuration, and that is no mere body without a head."""
    names = config.architectures
    for name in names if isinstance(names, list | tuple) else ():
        cls = getattr(transformers, name, None) if isinstance(name, str) else None
        takes: Any = getattr(cls, "config_class", None)
        fits = takes is not None and takes in (type(config), config.sub_configs.get("text_config"))
        if (
            cls is not None
            and fits
            and (issubclass(cls, GenerationMixin) or cls is not _body(takes))
        ):
            return cls
    return None


def _body(takes: type) -> Any:
    """The class of the model without a head for a class of configurations."""
    return transformers.AutoModel._model_mapping.get(takes, None)


@contextmanager
def building(
    where: str | Path, error: type[QmoeError] = SourceError, what: str = ""
) -> Iterator[None]:
    """Turns whatever transformers says about a config.json's model into one sentence.

    Args:
        where: the checkpoint.
        error: raised instead.
        what: transformers is doing with the model beside building it: "load", "run".
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _BAD_CONFIG as e:
        says = (
            f"describes a model that transformers cannot {what}" if what else "describes no model"
        )
        text = " ".join(str(e).split())[:200]
        raise error(f"{where}/config.json {says}: {type(e).__name__}: {text}") from e
