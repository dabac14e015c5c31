"""Everything but the experts, under the names of the published checkpoint, into vLLM's classes.

The experts' streams never pass through here: they are read when the layers are processed.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from vllm.config import ModelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from qmoe.engines.vllm.config import QmoeConfig
from qmoe.engines.vllm.mends import mend
from qmoe.errors import CorruptError, UnsupportedModelError
from qmoe.store.reader import Container


class QmoeLoader(DefaultModelLoader):
    """vLLM's load format "qmoe"."""

    quant_config: QmoeConfig

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing: the front end has done it."""

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> nn.Module:
        """As vLLM's; remembers whose weights these are, and mends what vLLM computes otherwise."""
        if not isinstance(vllm_config.quant_config, QmoeConfig):
            raise UnsupportedModelError(
                f"{model_config.model} was not written by `qmoe compress`; leave --load-format"
            )
        self.quant_config = vllm_config.quant_config
        model: nn.Module = super().load_model(vllm_config, model_config, prefix)
        mend(model, model_config.hf_text_config)
        return model

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fills the model and proves that nothing was left as it was before.

        vLLM tells a missing tensor of a quantized model by nothing, and part of a merged one (a
        key projection, say) by nothing at all; so parameters start as NaN.

        Raises:
            CorruptError: with the parameters that no tensor filled.
            UnsupportedModelError: they are experts, for which this class of vLLM has no layer.
        """
        floats = [(n, p) for n, p in model.named_parameters() if p.dtype.is_floating_point]
        for _, parameter in floats:
            parameter.data.fill_(torch.nan)
        model.load_weights(self.get_all_weights(model_config, model))  # type: ignore[operator]
        empty = [name for name, p in floats if bool(torch.isnan(p).any())]
        container, kind = self.quant_config.container, type(model).__name__
        if experts := [n for n in empty if n.startswith(tuple(f"{p}." for p in container.modules))]:
            raise UnsupportedModelError(
                f"{container.directory}: vLLM's {kind} has no layer that takes encoded experts "
                f"({experts[0]}), as the family has no class of its own in vLLM; use `qmoe serve` "
                "without --engine vllm"
            )
        if empty:
            raise CorruptError(
                f"{container.directory} has no tensor for {len(empty)} parameters of vLLM's "
                f"{kind}: {empty[:3]}"
            )

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Iterator[tuple[str, Tensor]]:
        """(name as published, tensor), one block of the model in memory at a time.

        Dense matrices are decoded. What belongs to experts modules is left out, biases and norms
        included, and so are tensors without a module (multi-token-prediction layers).
        """
        config = self.quant_config
        container, skeleton = config.container, config.skeleton
        for files in container.manifest["blocks"].values():
            own: dict[str, Tensor] = {}
            for name in _dense(container):
                place = container.tensors.get(name) or container.tensors[f"{name}.dense_stream"]
                if place[0] in files:
                    own[name] = _read(container, name, model_config.dtype)
            yield from revert_weight_conversion(skeleton, own).items()


def _dense(container: Container) -> list[str]:
    names = [*container.dense_names(), *container.dense]
    experts = tuple(f"{path}." for path in container.modules)
    return [name for name in names if not name.startswith(experts)]


def _read(container: Container, name: str, dtype: torch.dtype) -> Tensor:
    if name not in container.dense:
        return container.read(name)
    return container.dense_matrix(name).decode().to(dtype)


def choose_loader() -> None:
    """Lets a compressed model be loaded by `QmoeLoader` where no load format is given.

    vLLM has no hook through which a quantization method could ask for its loader; plug-ins of
    other formats (GGUF) wrap the same function.
    """
    plain = EngineArgs.create_engine_config

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> VllmConfig:
        made = plain(self, *args, **kwargs)
        if made.model_config.quantization == "qmoe":
            refuse(made)
            self.load_format = made.load_config.load_format = "qmoe"
        return made

    EngineArgs.create_engine_config = create_engine_config


def refuse(made: VllmConfig) -> None:
    """Says what a compressed model cannot do, before anything is started.

    Raises:
        UnsupportedModelError: something of the kind was asked for.
    """
    asked = {
        f"--load-format {made.load_config.load_format}": made.load_config.load_format
        not in ("auto", "qmoe"),
        "--enable-eplb": made.parallel_config.enable_eplb,
        "--enable-lora": made.lora_config is not None,
    }
    reasons = {
        "--enable-eplb": "encoded experts are not exchanged between ranks",
        "--enable-lora": "encoded experts take no adapters; merge yours before `qmoe compress`",
    }
    for option in [option for option, given in asked.items() if given]:
        reason = reasons.get(option, "the weights are encoded, leave it out")
        raise UnsupportedModelError(f"{made.model_config.model}: {option} cannot be used: {reason}")
