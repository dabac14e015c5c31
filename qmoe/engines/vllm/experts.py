"""A layer's experts in vLLM: qmoe's own module, fed with vLLM's routing through one operator.

vLLM routes (groups, bias correction, scaling), runs shared experts and adds up the ranks; gate
function, biases and norms of the experts are those of the family's class in transformers.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.platforms import current_platform

from qmoe.engines.vllm.ranks import build, bytes_of, dealt, owned
from qmoe.errors import UnsupportedModelError
from qmoe.inference.experts import BACKENDS, Backend, EncodedExperts
from qmoe.inference.on_cpu import run_on_cpu

if TYPE_CHECKING:
    from qmoe.engines.vllm.config import QmoeConfig

_logger = init_logger("vllm.qmoe.experts")


@torch.library.custom_op("qmoe_vllm::experts", mutates_args=())
def experts(hidden: Tensor, index: Tensor, weights: Tensor, layer: str) -> Tensor:
    """The part of this rank in a layer's experts: one operator that nobody traces into.

    Args:
        hidden: [n, cols].
        index: int64 [n, slots], local numbers; -1 is another rank's expert.
        weights: [n, slots].
        layer: vLLM's name of the layer.

    Returns:
        [n, cols], dtype and device of `hidden`.
    """
    runner: Any = get_forward_context().no_compile_layers[layer]
    module: EncodedExperts | None = runner.routed_experts.encoded
    if module is None:  # more ranks than experts
        return torch.zeros_like(hidden)
    backend: Backend = BACKENDS.get(hidden.device.type, run_on_cpu)
    return backend(module, hidden, index, weights)


@experts.register_fake
def _(hidden: Tensor, index: Tensor, weights: Tensor, layer: str) -> Tensor:
    return torch.empty_like(hidden)


class QmoeMoEMethod(FusedMoEMethodBase):
    """Routed experts that stay encoded, whole experts dealt to the ranks."""

    def __init__(self, config: "QmoeConfig", layer: RoutedExperts) -> None:
        """Raises:
        UnsupportedModelError: something is asked of the experts that they cannot do.
        """
        super().__init__(layer.moe_config)
        self.config = config
        if getattr(layer.moe_config, "is_lora_enabled", False):
            raise UnsupportedModelError(
                f"{layer.layer_name}: experts are encoded and take no LoRA adapters; "
                "leave --enable-lora, or merge the adapter before `qmoe compress`"
            )

    @property
    def supports_eplb(self) -> bool:
        """No: encoded experts have no common shape in which they could be exchanged."""
        return False

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """None: vLLM's own kernels do not run."""
        return None

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, *_: Any, **__: Any
    ) -> tuple[int, int]:
        """Sizes are those of the streams; nothing is padded."""
        return hidden_size, intermediate_size_per_partition

    def create_weights(self, layer: RoutedExperts, *_: Any, **__: Any) -> None:
        """None: streams have no shape before they are read."""

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Reads what this rank needs of the layer, and only that.

        Raises:
            UnsupportedModelError: vLLM counts other experts than the checkpoint.
        """
        config = self.config
        path = config.path_of(layer.layer_name)
        layout = config.container.modules[path]
        if layer.global_num_experts != layout.experts:
            raise UnsupportedModelError(
                f"{layer.layer_name}: vLLM has {layer.global_num_experts} experts, {path} has "
                f"{layout.experts} (redundant experts and fused shared experts are not supported)"
            )
        index = self._index(layer, layout.experts)
        own = owned(index)
        module = None
        if own:
            host = copy.deepcopy(config.skeleton.get_submodule(path))  # loses its parameters
            module = build(config.container, host, path, own, config.caches, layer.params_dtype)
        device = torch.device(current_platform.device_type)
        if module is not None and not current_platform.is_cpu():
            _to_gpu(module, device, layer.moe_config.experts_per_token)
        layer.register_module("encoded", module)
        # one more for every id that is no expert: it and all above are nobody's
        index = torch.cat([index, index.new_full((1,), -1)]).to(device)
        layer.register_buffer("qmoe_index", index, persistent=False)
        _logger.debug(
            "%s: %d of %d experts, %d bytes", path, len(own), layout.experts, bytes_of(module)
        )

    @staticmethod
    def _index(layer: RoutedExperts, count: int) -> Tensor:
        if layer.expert_map is not None:  # expert parallel: as vLLM deals them
            found: Tensor = layer.expert_map
            return found.long().cpu()
        parallel = layer.moe_config.moe_parallel_config
        return dealt(count, parallel.tp_rank, parallel.tp_size)

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """The routed experts of this rank; shared ones are run by vLLM's runner."""
        count = layer.global_num_experts
        index = layer.qmoe_index[topk_ids.long().clamp(-1, count)]
        if layer.apply_router_weight_on_input:  # Llama 4: one expert a token
            if topk_ids.shape[1] != 1:
                raise UnsupportedModelError(
                    f"{layer.layer_name}: router weights on the input of {topk_ids.shape[1]} "
                    "experts a token are not supported, only of one"
                )
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        out: Tensor = experts(x, index, topk_weights, layer.layer_name)
        return out


def _to_gpu(module: EncodedExperts, device: torch.device, top_k: int) -> None:
    from qmoe.inference.cuda import register, settle

    register()
    settle(module, device, top_k)
    module.to(device)  # norms; of the streams nothing is left
