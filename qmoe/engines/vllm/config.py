"""``quantization_config`` with quant_method "qmoe", as vLLM wants it: which checkpoint this is."""

import os
import re
import socket
from functools import cached_property
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from qmoe.engines.vllm.experts import QmoeMoEMethod
from qmoe.errors import UnsupportedModelError
from qmoe.inference.cache import environment_bytes
from qmoe.inference.experts import Caches
from qmoe.inference.structure import build, check
from qmoe.store.reader import Container
from qmoe.system.hub import download

_logger = init_logger("vllm.qmoe")  # below vLLM's own logger, whose handlers and level it takes
_NUMBER = re.compile(r"\.(\d+)(?=\.)")
_OPENED = ("container", "skeleton", "caches")  # what every process opens for itself


class QmoeConfig(QuantizationConfig):
    """One compressed checkpoint. Made and verified in the front end; the other processes get it by
    pickle and open the files themselves, without hashing them again.

    Attributes:
        name, revision: as the user gave the model: a directory, or an id on the hub.
        verified_on: the host whose copy of the files was verified.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = ""
        self.revision: str | None = None
        self.verified_on = ""

    def get_name(self) -> Any:
        """ "qmoe"."""
        return "qmoe"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """All that the kernels and the CPU path take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of a CUDA device: what triton compiles for."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: it is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QmoeConfig":
        """Args: config: ``quantization_config`` of config.json; read again from the files, where
        it is checked."""
        return cls()

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Called in the front end, before any other process and before the port is opened.

        Raises:
            CorruptError: any file is not as it was written.
            FormatVersionError: another format version.
        """
        if self.verified_on:
            return
        self.name, self.revision = model_name, revision
        container = self.container  # verified by opening it
        check(container)
        self.verified_on = socket.gethostname()
        experts = sum(m.experts for m in container.modules.values())
        _logger.info("qmoe: %s is sound (%d experts)", container.directory, experts)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in _OPENED}

    def __deepcopy__(self, memo: dict[int, Any]) -> "QmoeConfig":
        copy = type(self)()
        copy.__dict__.update(self.__getstate__())
        return copy

    @cached_property
    def container(self) -> Container:
        """The opened checkpoint; every file's checksum is compared once on every host."""
        where = self.name
        if not os.path.isdir(where):
            where = download(where, self.revision)
        return Container.open(where, check=self.verified_on != socket.gethostname())

    @cached_property
    def skeleton(self) -> Any:
        """The transformers model on the meta device: its experts modules know the family's gate,
        and its class the names of the published tensors."""
        return build(self.container)

    @cached_property
    def caches(self) -> Caches:
        """Of this model alone: their keys are paths, which models of a family share."""
        return Caches(environment_bytes())

    def path_of(self, prefix: str) -> str:
        """The path in the transformers model of vLLM's experts layer `prefix`: the module with the
        same numbers, since names differ ("block_sparse_moe").

        Raises:
            UnsupportedModelError: not exactly one module has them.
        """
        numbers = _NUMBER.findall(prefix + ".")
        found = [p for p in self.container.modules if _NUMBER.findall(p + ".") == numbers]
        if len(found) != 1:
            raise UnsupportedModelError(
                f"{self.container.directory} holds {len(found)} experts modules for vLLM's "
                f"{prefix}; a layer for speculative decoding (multi-token prediction) is not "
                "compressed and cannot be served, leave --speculative-config"
            )
        return found[0]

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Encoded routed experts; everything else as in a plain checkpoint.

        Attention with absorbed matrices (MLA) asks for exactly `UnquantizedLinearMethod`.
        """
        if isinstance(layer, RoutedExperts):
            return QmoeMoEMethod(self, layer)
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        return None
