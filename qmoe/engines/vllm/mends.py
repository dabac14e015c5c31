"""Where vLLM 0.32 computes something else than the model that was compressed, without a word.

Each was found because tokens differed from transformers' with plain weights too, and each changes
nothing where vLLM computes it rightly: later versions may.
"""

from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.platforms import current_platform

from qmoe.errors import UnsupportedModelError


def mend(model: nn.Module, config: Any) -> None:
    """Called when a model is loaded.

    Args:
        model: vLLM's.
        config: what config.json says.

    Raises:
        UnsupportedModelError: vLLM's router for CPUs would end at the first token.
    """
    _add_head_bias(model)
    if current_platform.is_cpu():
        _route(model)
        if hasattr(config, "qk_rope_head_dim"):
            _rotate_heads(model)


def _add_head_bias(model: nn.Module) -> None:
    """The bias of the head, which vLLM's class of Phi-3.5-MoE loads and never adds."""
    bias = getattr(getattr(model, "lm_head", None), "bias", None)
    logits = getattr(model, "logits_processor", None)
    if bias is None or logits is None:
        return
    plain = logits.forward

    def forward(head: Any, hidden: Tensor, given: Tensor | None = None, *rest: Any) -> Any:
        return plain(head, hidden, bias if given is None else given, *rest)

    logits.forward = forward


def _route(model: nn.Module) -> None:
    """Sigmoid scores and correction biases of routers without groups (MiniMax-M2, ERNIE).

    vLLM's router for CPUs knows both in groups only: without, it asserts softmax and leaves the
    bias out. One group of all experts is no group.
    """
    for name, module in model.named_modules():
        router = getattr(module, "router", None)
        if not isinstance(router, CPURouter) or router.use_grouped_topk:
            continue
        if router.custom_routing_function is not None or router.scoring_func == "sqrtsoftplus":
            continue
        if router.scoring_func not in ("softmax", "sigmoid"):
            raise UnsupportedModelError(
                f"{name}: vLLM's router for CPUs does not know {router.scoring_func} scores; use "
                "a GPU, or `qmoe serve` without --engine vllm"
            )
        if router.scoring_func == "sigmoid" or router.e_score_correction_bias is not None:
            router.use_grouped_topk = True
            router.num_expert_group = router.topk_group = 1


def _rotate_heads(model: nn.Module) -> None:
    """Positions of latent attention where they are not scaled (no YaRN).

    Its heads are a dimension of their own, which vLLM's kernel for CPUs takes for tokens: every
    head but the first gets another token's position. vLLM's plain code does not.
    """
    module: Any
    for module in model.modules():
        if type(module) is RotaryEmbedding:
            module.forward = module.forward_native
