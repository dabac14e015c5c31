"""fairseq's mixture-of-experts language models (``moe_lm``, Artetxe et al. 2021).

A pre-norm GPT with sinusoidal positions and scaled embeddings, which transformers knows as XGLM; in
the sparse layers the network is replaced by experts with biases and the same activation, chosen by
a float32 softmax. Two experts per token share a weight of 1 in proportion to their probabilities; a
single expert is weighted with its probability. The second expert is the second most probable:
fairseq's option to sample it, and its capacity limits, are for training.
"""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import XGLMConfig, XGLMForCausalLM, XGLMModel
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.models.xglm.modeling_xglm import (
    XGLMAttention,
    XGLMDecoderLayer,
    XGLMPreTrainedModel,
    XGLMScaledWordEmbedding,
    XGLMSinusoidalPositionalEmbedding,
)

from qmoe.models.projects.sparse import Experts, Router, SparseInit, SparseLayer


class FairseqMoeConfig(XGLMConfig):
    """XGLM's config and the layout of the experts.

    Attributes:
        num_experts: experts of a sparse layer.
        num_experts_per_tok: how many a token uses.
        sparse_layers: indices of the layers with experts.
        norm_topk_prob: whether the used probabilities are made to sum to 1.
    """

    model_type = "fairseq_moe"

    num_experts: int = 8
    num_experts_per_tok: int = 2
    sparse_layers: list[int] | tuple[int, ...] = ()
    norm_topk_prob: bool = True


@use_experts_implementation(has_gate=False, has_bias=True)
class FairseqMoeExperts(Experts):
    """``up_proj`` [E, I, H], ``down_proj`` [E, H, I], and a bias for each."""

    def __init__(self, config: Any) -> None:
        super().__init__(
            config, config.num_experts, config.d_model, config.ffn_dim, first=1, bias=True
        )
        self.act_fn = ACT2FN[config.activation_function]


class FairseqMoeDecoderLayer(XGLMDecoderLayer):
    """XGLM's layer; sparse layers hold `moe` in place of fc1 and fc2."""

    def __init__(self, config: FairseqMoeConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        self.sparse = layer_idx in config.sparse_layers
        if self.sparse:
            del self.fc1, self.fc2
            k, p = config.num_experts_per_tok, 1.0 if config.norm_topk_prob else None
            router = Router(config.num_experts, config.d_model, k, norm=p)
            self.moe = SparseLayer(router, FairseqMoeExperts(config), config.d_model)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """x [batch, length, H] -> the same shape; there is no encoder."""
        kwargs.pop("encoder_attention_mask", None)
        attended, _ = self.self_attn(
            self.self_attn_layer_norm(hidden_states),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        x = self.final_layer_norm(hidden_states)
        out: Tensor = self.moe(x) if self.sparse else self.fc2(self.activation_fn(self.fc1(x)))
        return hidden_states + out


class FairseqMoeModel(SparseInit, XGLMModel):
    """The decoder without a head."""

    config_class = FairseqMoeConfig
    _no_split_modules = ("FairseqMoeDecoderLayer",)

    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": FairseqMoeDecoderLayer,
        "attentions": XGLMAttention,
    }

    def __init__(self, config: FairseqMoeConfig) -> None:
        XGLMPreTrainedModel.__init__(self, config)
        self.dropout = self.layerdrop = 0.0
        self.padding_idx = config.pad_token_id
        self.max_target_positions = config.max_position_embeddings
        scale = config.d_model**0.5 if config.scale_embedding else 1.0
        self.embed_tokens = XGLMScaledWordEmbedding(
            config.vocab_size, config.d_model, self.padding_idx, embed_scale=scale
        )
        self.embed_positions = XGLMSinusoidalPositionalEmbedding(
            config.max_position_embeddings, config.d_model, config.pad_token_id
        )
        self.layers = nn.ModuleList(
            FairseqMoeDecoderLayer(config, i) for i in range(config.num_layers)
        )
        self.layer_norm = nn.LayerNorm(config.d_model)
        self.gradient_checkpointing = False
        self.post_init()


class FairseqMoeForCausalLM(SparseInit, XGLMForCausalLM):
    """The model with its language model head."""

    # transformers caches a guess from the source, which a parent's answer may hide
    _can_set_experts_implementation_cached_value = True

    config_class = FairseqMoeConfig
    _no_split_modules = ("FairseqMoeDecoderLayer",)

    def __init__(self, config: FairseqMoeConfig) -> None:
        XGLMPreTrainedModel.__init__(self, config)
        self.model = FairseqMoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
