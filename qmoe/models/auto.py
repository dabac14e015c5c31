"""Which of transformers' Auto classes builds a model that generates text from a configuration."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError

from qmoe.errors import QmoeError, reason

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
    """The Auto class for a configuration; the causal one for types that transformers does not list
    (their code comes with the checkpoint).
    """
    if config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM
    for name in _TEXT:
        auto = getattr(transformers, name)
        if type(config) in auto._model_mapping:
            return auto
    return transformers.AutoModelForCausalLM


@contextmanager
def building(directory: Path, error: type[QmoeError]) -> Iterator[None]:
    """Turns whatever transformers says while it builds a config.json's model into one sentence.

    Args:
        directory: that holds the file.
        error: raised instead.
    """
    try:
        yield
    except _BAD_CONFIG as e:
        raise error(f"{directory / 'config.json'} describes no model: {reason(e)}") from e
