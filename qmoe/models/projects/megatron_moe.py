"""Megatron-LM's GPT with MegaBlocks' dropless experts (Gale et al. 2023).

Megatron's GPT is GPT-2 with its own parameter layout; in the sparse layers MegaBlocks replaces the
network by experts without biases and adds one bias to their sum. Softmax over all experts, the k
largest used as they are or divided by their p-norm.
"""

from typing import Any

from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.models.gpt2.modeling_gpt2 import GPT2Block, GPT2PreTrainedModel

from qmoe.models.projects.sparse import Experts, Router, SparseInit, SparseLayer


class MegatronMoeConfig(GPT2Config):
    """GPT-2's config and the layout of the experts.

    Attributes:
        num_experts: experts of a sparse layer.
        num_experts_per_tok: how many a token uses.
        sparse_layers: indices of the layers with experts.
        router_norm: None, or the p of the norm that the used probabilities are divided by.
        expert_activation: name of the experts' activation.
        gated: whether experts have a gate: ``W2 (act(W1 x) * (V1 x))``.
        expert_bias: whether one bias is added to the sum over experts.
    """

    model_type = "megatron_moe"

    num_experts: int = 8
    num_experts_per_tok: int = 1
    sparse_layers: list[int] | tuple[int, ...] = ()
    router_norm: float | int | None = None
    expert_activation: str = "gelu_pytorch_tanh"
    gated: bool = False
    expert_bias: bool = True


def _inner(config: Any) -> int:
    return int(config.n_inner if config.n_inner is not None else 4 * config.n_embd)


@use_experts_implementation(has_gate=False)
class MegatronMoeExperts(Experts):
    """``up_proj`` [E, I, H], ``down_proj`` [E, H, I]."""

    def __init__(self, config: Any) -> None:
        super().__init__(
            config, config.num_experts, config.n_embd, _inner(config), first=1, bias=False
        )
        self.act_fn = ACT2FN[config.expert_activation]


@use_experts_implementation
class MegatronMoeGatedExperts(Experts):
    """``gate_up_proj`` [E, 2 I, H] (W1, then V1), ``down_proj`` [E, H, I]."""

    def __init__(self, config: Any) -> None:
        super().__init__(
            config, config.num_experts, config.n_embd, _inner(config), first=2, bias=False
        )
        self.act_fn = ACT2FN[config.expert_activation]


class MegatronMoeBlock(GPT2Block):
    """GPT-2's block, its network replaced in sparse layers."""

    def __init__(self, config: MegatronMoeConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        if layer_idx in config.sparse_layers:
            experts = (MegatronMoeGatedExperts if config.gated else MegatronMoeExperts)(config)
            k, p = config.num_experts_per_tok, config.router_norm
            router = Router(config.num_experts, config.n_embd, k, norm=p)
            self.mlp = SparseLayer(router, experts, config.n_embd, bias=config.expert_bias)


class MegatronMoeModel(SparseInit, GPT2Model):
    """The decoder without a head."""

    config_class = MegatronMoeConfig
    _no_split_modules = ("MegatronMoeBlock",)

    def __init__(self, config: MegatronMoeConfig) -> None:
        GPT2PreTrainedModel.__init__(self, config)
        self.embed_dim = config.n_embd
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(MegatronMoeBlock(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self._attn_implementation = config._attn_implementation
        self.post_init()


class MegatronMoeForCausalLM(SparseInit, GPT2LMHeadModel):
    """The model with its language model head."""

    # transformers caches a guess from the source, which a parent's answer may hide
    _can_set_experts_implementation_cached_value = True

    config_class = MegatronMoeConfig
    _no_split_modules = ("MegatronMoeBlock",)

    def __init__(self, config: MegatronMoeConfig) -> None:
        GPT2PreTrainedModel.__init__(self, config)
        self.transformer = MegatronMoeModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()
