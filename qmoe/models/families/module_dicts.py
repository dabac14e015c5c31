"""ModuleDicts of small networks: ``expert_0 .. expert_{E-1}``, each two ``nn.Linear`` around an
activation.

Switch Transformers (``wi``, ``wo``, no bias) hands its experts a one-hot mask; a token beyond an
expert's capacity has an all-zero row and gets zero. NLLB-MoE (``fc1``, ``fc2``, with bias) hands
them the combination weights [n, E] of its top-2 router. NLLB's own experts forward in transformers
5.x reads a 0/1 mask as expert numbers, so that only experts 0 and 1 ever run; the equation ``y_i =
sum over e of p[i, e] * ffn_e(x_i)`` (GShard, https://arxiv.org/abs/2006.16668, section 2.2, as in
fairseq's release of the model) is what `_route_nllb` states.
"""

from typing import Any

import torch
from torch import Tensor

from qmoe.models.families.kind import Bias, Kind, Linear, Record, Routed, no_biases
from qmoe.types import ProjectionShape


def _kind(
    name: str, class_name: str, up: str, down: str, *, biased: bool, route: Any, repair: bool
) -> Kind:
    parts = {"up": up, "down": down}

    def expert_of(module: Any, expert: int) -> Any:
        return module[f"expert_{expert}"]

    def count(module: Any) -> int:
        return sum(child.startswith("expert_") for child in module)

    def projections(module: Any) -> tuple[ProjectionShape, ...]:
        if not count(module):
            return ()
        one = expert_of(module, 0)
        shapes = {p: getattr(one, child).weight.shape for p, child in parts.items()}
        return tuple(ProjectionShape(p, s[0], s[1], inner=p == "down") for p, s in shapes.items())

    def encoded(module: Any) -> tuple[str, ...]:
        return tuple(
            f"expert_{e}.{child}.weight" for e in range(count(module)) for child in parts.values()
        )

    def read(module: Any, expert: int) -> dict[str, Tensor]:
        return {p: getattr(expert_of(module, expert), child).weight for p, child in parts.items()}

    def write(module: Any, expert: int, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for p, w in read(module, expert).items():
                w.copy_(weights[p])

    def biases(module: Any, owner: Any, expert: int) -> dict[str, Tensor]:
        linears = {p: owner.get_submodule(f"expert_{expert}.{c}") for p, c in parts.items()}
        return {p: x() if isinstance(x, Bias) else x.bias for p, x in linears.items()}

    def ffn(
        module: Any, linear: Linear, bias: dict[str, Tensor], x: Tensor, record: Record | None
    ) -> Tensor:
        h = linear("up", x)
        if biased:
            h = h + bias["up"].to(h.dtype)
        h = expert_of(module, 0).act(h)  # it has no parameters: the same for all experts
        if record is not None:
            record(h)
        y = linear("down", h)
        return y + bias["down"].to(y.dtype) if biased else y

    return Kind(
        name=name,
        matches=lambda module: type(module).__name__ == class_name,
        experts=count,
        projections=projections,
        encoded=encoded,
        read=read,
        write=write,
        biases=biases if biased else no_biases,
        ffn=ffn,
        route=route,
        repair=repair,
    )


def _route_switch(module: Any, hidden: Tensor, mask: Tensor, weights: Tensor) -> Routed:
    """hidden [n, d]; mask [n, 1, E], one-hot or zero; weights [n, 1]."""
    experts = mask.shape[-1]
    flat = mask.reshape(-1, experts)
    index = torch.where(flat.sum(-1) > 0, flat.argmax(-1), experts)
    return Routed(hidden, index[:, None], weights.reshape(-1, 1), tuple(hidden.shape[:-1]))


def _route_nllb(module: Any, hidden: Tensor, mask: Tensor, probs: Tensor) -> Routed:
    """hidden [n, d]; mask [n, E], unused: it lacks the second choices; probs [n, E], zero where
    not routed."""
    experts = probs.shape[-1]
    weights, index = probs.topk(min(2, experts), dim=-1)
    index = torch.where(weights > 0, index, experts)
    if module.moe_token_dropout > 0:  # at inference the expected value of the dropped output
        weights = weights * (1 - module.moe_token_dropout)
    return Routed(hidden, index, weights, tuple(hidden.shape[:-1]))


SWITCH = _kind(
    "switch",
    "SwitchTransformersExperts",
    "wi",
    "wo",
    biased=False,
    route=_route_switch,
    repair=False,
)
NLLB = _kind("nllb", "NllbMoeExperts", "fc1", "fc2", biased=True, route=_route_nllb, repair=True)
