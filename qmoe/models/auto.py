"""Which of transformers' Auto classes builds a model that generates text from a configuration."""

from typing import Any

import transformers

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
