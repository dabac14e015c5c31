"""OpenMoE (Xue et al. 2024): a decoder in ST-MoE's style.

Pre-norm layers with RMSNorm, rotary positions (base 10000, halves rotated), attention without the
1/sqrt(d) factor (T5's convention), SwiGLU networks with three halves: with [a; b] = W_gate x,
``W_down ((a * silu(b)) * (W_up x))``. Every n-th layer has experts in place of its network,
followed by a dense network of its own with its own norm and residual. The router is a float32
softmax whose two largest probabilities are used as they are. Capacity limits are a matter of
training and are not applied.
"""

from typing import Any, ClassVar

import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.integrations import use_experts_implementation
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from qmoe.models.projects.sparse import Experts, Router, SparseInit, SparseLayer


@strict  # collects the validators anew, so that the one below replaces Llama's
class OpenMoeConfig(LlamaConfig):
    """Llama's config and the layout of the experts.

    Attributes:
        num_experts: experts of a sparse layer.
        num_experts_per_tok: how many a token uses.
        moe_layer_interval: layer i is sparse if i + 1 is a multiple.
        norm_topk_prob: whether the used probabilities are made to sum to 1.
    """

    model_type = "openmoe"

    num_experts: int = 32
    num_experts_per_tok: int = 2
    moe_layer_interval: int = 6
    norm_topk_prob: bool = False

    def validate_architecture(self) -> None:
        """Nothing to check: heads have a width of their own (24 of 128 at a width of 2048)."""

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return (layer + 1) % self.moe_layer_interval == 0


def swiglu(h: Tensor) -> Tensor:
    """[..., 3 I] = [a; b; up] -> (a * silu(b)) * up, [..., I]."""
    a, b, up = h.chunk(3, -1)
    return a * F.silu(b) * up


@use_experts_implementation
class OpenMoeExperts(Experts):
    """``gate_up_proj`` [E, 3 I, H] (a, b, up) and ``down_proj`` [E, H, I]."""

    def __init__(self, config: Any) -> None:
        width, inner = config.hidden_size, config.intermediate_size
        super().__init__(config, config.num_experts, width, inner, first=3, bias=False)
        self.intermediate_size = inner

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return swiglu(gate_up)


class OpenMoeMLP(nn.Module):
    """The dense network: ``gate_up_proj`` [3 I, H] (a, b, up), ``down_proj`` [H, I]."""

    def __init__(self, config: OpenMoeConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 3 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """x [..., H] -> [..., H]."""
        out: Tensor = self.down_proj(swiglu(self.gate_up_proj(hidden_states)))
        return out


class OpenMoeDecoderLayer(LlamaDecoderLayer):
    """Attention and a network; in sparse layers experts, then a second, dense network."""

    def __init__(self, config: OpenMoeConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)
        norm = (config.hidden_size, config.rms_norm_eps)
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.self_attn.scaling = 1.0
        self.input_layernorm = LlamaRMSNorm(*norm)
        self.post_attention_layernorm = LlamaRMSNorm(*norm)
        self.sparse = config.is_sparse(layer_idx)
        self.mlp: nn.Module
        if self.sparse:
            p = 1.0 if config.norm_topk_prob else None
            router = Router(
                config.num_experts, config.hidden_size, config.num_experts_per_tok, norm=p
            )
            self.mlp = SparseLayer(router, OpenMoeExperts(config), config.hidden_size)
            self.pre_extra_mlp_layernorm = LlamaRMSNorm(*norm)
            self.extra_mlp = OpenMoeMLP(config)
        else:
            self.mlp = OpenMoeMLP(config)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As LlamaDecoderLayer."""
        out: Tensor = super().forward(hidden_states, *args, **kwargs)
        if self.sparse:
            out = out + self.extra_mlp(self.pre_extra_mlp_layernorm(out))
        return out


class OpenMoeModel(SparseInit, LlamaModel):
    """The decoder without a head."""

    config_class = OpenMoeConfig
    _no_split_modules = ("OpenMoeDecoderLayer",)

    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": OpenMoeDecoderLayer,
        "attentions": LlamaAttention,
    }

    def __init__(self, config: OpenMoeConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            OpenMoeDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class OpenMoeForCausalLM(SparseInit, LlamaForCausalLM):
    """OpenMoE with its language model head, which is not tied to the embeddings."""

    # transformers caches a guess from the source, which a parent's answer may hide
    _can_set_experts_implementation_cached_value = True

    config_class = OpenMoeConfig
    _no_split_modules = ("OpenMoeDecoderLayer",)

    def __init__(self, config: OpenMoeConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = OpenMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
