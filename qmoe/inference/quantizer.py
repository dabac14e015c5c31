"""Loading a compressed checkpoint through transformers: the quantization method "qmoe".

The weights are stored under names that transformers does not look for by itself: without ``import
qmoe``, loading stops with "no file named model.safetensors"; it never yields random experts.

The hooks of `HfQuantizer` are read from transformers 5.23; the order they rely on (config ->
`update_attn_implementation` -> weight files -> model on meta ->
`_process_model_before_weight_loading` -> weights -> `_process_model_after_weight_loading`) is
covered by tests/test_load.py.

`qmoe.inference.registration` imports this module while transformers is being imported. It therefore
imports nothing of ours that uses transformers, except inside functions.
"""

import os
import warnings
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qmoe.errors import CorruptError
from qmoe.inference.cache import environment_bytes
from qmoe.system.hub import download

if TYPE_CHECKING:
    from qmoe.store.reader import Container

# What `load` has verified, for the quantizer that transformers creates on the way.
OPENED: ContextVar["Container | None"] = ContextVar("opened", default=None)
# Whether dense matrices may stay integers, as `load` was asked.
INTEGERS: ContextVar[bool] = ContextVar("integers", default=True)


class QmoeConfig(QuantizationConfigMixin):
    """``quantization_config`` of a compressed checkpoint.

    Attributes:
        format_version: of the container.
        modules: geometry of every experts module by path, see `qmoe.store.writer.geometry`.
        dense: geometry of every encoded dense matrix by parameter name.
        cache_bytes: bound of decoded matrices kept in memory; None leaves it to the environment
            variable QMOE_CACHE_BYTES, else 0.
    """

    def __init__(
        self,
        format_version: int | None = None,
        modules: dict[str, Any] | None = None,
        cache_bytes: int | None = None,
        dense: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = "qmoe"
        self.format_version = format_version
        self.modules = modules or {}
        self.cache_bytes = cache_bytes
        self.dense = dense or {}

    def to_dict(self) -> dict[str, Any]:
        """The stored form; a setting of the reader is not part of it."""
        stored = {
            "quant_method": "qmoe",
            "format_version": self.format_version,
            "modules": self.modules,
        }
        return {**stored, "dense": self.dense} if self.dense else stored


class QmoeQuantizer(HfQuantizer):
    """Swaps encoded experts into a model that transformers is about to load."""

    requires_calibration = True  # it cannot quantize on the fly; `qmoe compress` does that

    def __init__(self, quantization_config: QmoeConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.container: Container | None = None
        self.failures: list[CorruptError] = []
        self.kept: dict[str, Any] = {}  # dense matrices that stay integers

    def update_attn_implementation(self, config: Any) -> Any:
        """Not about attention: the hook that runs after the config is read and before weight files
        are resolved."""
        from qmoe.inference.structure import check
        from qmoe.store.reader import Container, parse_quantization
        from qmoe.store.writer import INDEX

        if self.container is not None:  # versions that call both hooks
            return config
        parse_quantization(self.quantization_config.to_dict())
        self.container = OPENED.get()
        where = config._name_or_path
        if self.container is None and where:
            if not os.path.isdir(where):  # transformers itself would fetch config and weights only
                where = download(where, getattr(config, "_commit_hash", None))
            self.container = Container.open(where)
            check(self.container)  # before a wrong config can shape a model
        config.transformers_weights = INDEX
        return config

    def update_ep_plan(self, config: Any) -> Any:
        """The same hook in transformers 5.17, which has no other there (5.23 lacks this one)."""
        return self.update_attn_implementation(config)

    def _process_model_before_weight_loading(
        self,
        model: Any,
        checkpoint_files: list[str] | None = None,
        device_map: Any = None,
        **_: Any,
    ) -> None:
        from qmoe.inference.dense import keep_integers
        from qmoe.inference.experts import Caches
        from qmoe.inference.structure import check_class, compare, swap
        from qmoe.store.reader import Container

        if not checkpoint_files:
            raise CorruptError(
                "a compressed checkpoint is loaded from its directory, not from a state dict"
            )
        directory = Path(checkpoint_files[0]).parent
        if self.container is None or not directory.samefile(self.container.directory):
            self.container = Container.open(directory)
        check_class(model, self.container)
        caches = Caches(self._cache_bytes())
        for layout in self.container.modules.values():
            swap(model, layout, self.container, caches)
        compare(model, self.container)
        places = {"": "cpu"} if device_map is None else device_map
        on_cpu = isinstance(places, dict) and {str(p) for p in places.values()} == {"cpu"}
        if INTEGERS.get() and on_cpu and not torch.cuda.is_available():
            self.kept = keep_integers(model, self.container)

    def _cache_bytes(self) -> int:
        if self.quantization_config.cache_bytes is not None:
            return int(self.quantization_config.cache_bytes)
        return environment_bytes()

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: Any = None
    ) -> list[Any]:
        """None of the family's: tensors are stored under the names of the modules, to be taken
        literally. Encoded dense matrices are decoded. (transformers 5.17 to 5.19 hand over no
        model.)"""
        from qmoe.inference.dense import converters

        if self.container is None:
            return []
        return converters(self.container, self.failures, self.kept)

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """Bytes stay bytes; what is decoded from them learns its dtype here."""
        from qmoe.inference.dense import Decode

        for operation in getattr(converter, "operations", ()):
            if isinstance(operation, Decode):
                operation.dtype = dtype
                return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        from qmoe.inference.adapters import watch_peft
        from qmoe.inference.dense import give_scales
        from qmoe.inference.save import save_pretrained

        if self.failures:
            raise self.failures[0]
        give_scales(model, self.kept)
        # transformers marks the config as quantized; some families (jamba) then expect quantized
        # Linears, which there are none of.
        for module in model.modules():
            config = getattr(module, "config", None)
            if config is not None:
                vars(config).pop("_is_quantized", None)
        if self.container is not None:
            model.qmoe_manifest = self.container.manifest
            model.qmoe_directory = str(self.container.directory)
        # no bound method: pickle would look it up by its name, and find the class's
        model.save_pretrained = partial(save_pretrained, model)
        watch_peft()
        if torch.cuda.is_available():
            use_kernels(model)
        return model

    @property
    def is_compileable(self) -> bool:
        """Yes: experts are operators of fixed shapes. `generate` neither compiles nor captures a
        model that says no, static cache or not.
        """
        return True

    def is_serializable(self, **_: Any) -> bool:
        """Saving writes the same format, see `qmoe.inference.save`."""
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def use_kernels(model: Any) -> None:
    """Lets a loaded model's experts run on the GPUs that they are on; where the kernels cannot be
    imported (no triton, or one that has changed), a warning says so and the CPU decodes.
    """
    try:
        from qmoe.inference.cuda import prepare, register
    except (ImportError, AttributeError) as e:
        warnings.warn(
            f"the kernels cannot be used, experts are decoded on the CPU: {e}", stacklevel=2
        )
        return
    register()
    prepare(model)
