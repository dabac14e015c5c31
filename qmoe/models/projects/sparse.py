"""Parts that the models here share: experts, a router, a sparse layer, their initialization."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init


class Experts(nn.Module):
    """E feed-forward networks in 3-D parameters; subclasses name the activation and are decorated.

    For every token t and slot s: ``y[t] += top_k_weights[t, s] * ffn[top_k_index[t, s]](x[t])``.

    Args:
        config: the model's config; transformers' decorator keeps it.
        experts: E.
        hidden: width of the model, H.
        inner: width of an expert, I.
        first: rows of the first matrix, as a multiple of I (1 without gate, 2 with one).
        bias: whether both matrices have biases.
    """

    has_gate: bool  # set by transformers' decorator, as all flags
    has_bias: bool
    act_fn: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]

    def __init__(
        self, config: Any, experts: int, hidden: int, inner: int, first: int, bias: bool
    ) -> None:
        super().__init__()
        self.num_experts = experts
        name = "gate_up_proj" if first > 1 else "up_proj"
        self.register_parameter(name, nn.Parameter(torch.empty(experts, first * inner, hidden)))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))
        if bias:
            self.register_parameter(
                f"{name}_bias", nn.Parameter(torch.empty(experts, first * inner))
            )
            self.down_proj_bias = nn.Parameter(torch.empty(experts, hidden))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """x [n, H], index int [n, k], weights [n, k] -> [n, H]."""
        first = "gate_up_proj" if self.has_gate else "up_proj"
        w, b = getattr(self, first), getattr(self, f"{first}_bias", None)
        out = torch.zeros_like(hidden_states)
        for e in torch.unique(top_k_index).tolist():
            token, slot = torch.where(top_k_index == e)
            h = F.linear(hidden_states[token], w[e], None if b is None else b[e])
            h = self._apply_gate(h) if self.has_gate else self.act_fn(h)
            y = F.linear(h, self.down_proj[e], self.down_proj_bias[e] if self.has_bias else None)
            out.index_add_(0, token, (y * top_k_weights[token, slot, None]).to(out.dtype))
        return out


class Router(nn.Module):
    """Softmax over all experts in float32, then the k largest.

    Args:
        norm: None to use the probabilities as they are, p to divide them by their p-norm.
    """

    def __init__(self, experts: int, hidden: int, k: int, norm: float | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        self.k, self.norm = k, norm

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [n, H] -> (logits float32 [n, E], weights [n, k], index int64 [n, k])."""
        logits = F.linear(hidden_states.float(), self.weight.float())
        weights, index = logits.softmax(-1).topk(self.k, -1)
        if self.norm is not None:
            weights = weights / weights.norm(p=self.norm, dim=-1, keepdim=True)
        return logits, weights.to(hidden_states.dtype), index


class SparseLayer(nn.Module):
    """A router and its experts in place of a feed-forward network. No capacity: no token is
    dropped.

    Args:
        bias: whether one bias [H] is added to the sum over experts.
    """

    def __init__(self, router: Router, experts: nn.Module, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.router, self.experts = router, experts
        self.bias = nn.Parameter(torch.empty(hidden)) if bias else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """x [..., H] -> [..., H]."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, index = self.router(flat)
        out: Tensor = self.experts(flat, index, weights).reshape(hidden_states.shape)
        return out if self.bias is None else out + self.bias


class SparseInit:
    """Mixin before a PreTrainedModel: initializes the modules above, which transformers does not
    know.
    """

    config: Any

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, Experts | Router | SparseLayer):
            for name, p in module.named_parameters(recurse=False):
                if "bias" in name:
                    init.zeros_(p)
                else:
                    init.normal_(p, 0.0, 0.02)
