"""The three families that share no interface with any other: Llama 4, DBRX and JetMoE."""

from typing import Any

import torch
from torch import Tensor

from qmoe.models.families.kind import Kind, Linear, Record, Routed, no_biases
from qmoe.types import ProjectionShape


def _gated(module: Any, linear: Linear, act: Any, x: Tensor, record: Record | None) -> Tensor:
    gate, up = linear("gate_up", x).chunk(2, -1)
    h = act(gate) * up
    if record is not None:
        record(h)
    return linear("down", h)


# Llama 4: gate_up_proj [E, H, 2I], down_proj [E, I, H]. Its forward gets [E * n, H]: every token
# once per expert, already multiplied by the router's score; rows of tokens that were not routed
# are exact zeros (and so is an expert's answer to them).


def _llama4_projections(module: Any) -> tuple[ProjectionShape, ...]:
    _, hidden, double = module.gate_up_proj.shape
    return ProjectionShape("gate_up", double, hidden, False), ProjectionShape(
        "down", hidden, double // 2, True
    )


def _llama4_read(module: Any, expert: int) -> dict[str, Tensor]:
    return {"gate_up": module.gate_up_proj[expert].T, "down": module.down_proj[expert].T}


def _llama4_write(module: Any, expert: int, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        module.gate_up_proj[expert].copy_(weights["gate_up"].T)
        module.down_proj[expert].copy_(weights["down"].T)


def _llama4_route(module: Any, hidden: Tensor) -> Routed:
    flat = hidden.reshape(-1, hidden.shape[-1])
    per_expert = len(flat) // module.num_experts
    expert = torch.arange(module.num_experts, device=flat.device).repeat_interleave(per_expert)
    index = torch.where((flat != 0).any(-1), expert, module.num_experts)
    token = torch.arange(per_expert, device=flat.device).repeat(module.num_experts)
    return Routed(flat, index[:, None], None, tuple(flat.shape[:-1]), token)


LLAMA4 = Kind(
    name="llama4",
    matches=lambda module: type(module).__name__ == "Llama4TextExperts",
    experts=lambda module: int(module.num_experts),
    projections=_llama4_projections,
    encoded=lambda module: ("gate_up_proj", "down_proj"),
    read=_llama4_read,
    write=_llama4_write,
    biases=no_biases,
    ffn=lambda module, linear, biases, x, record: _gated(module, linear, module.act_fn, x, record),
    route=_llama4_route,
)


# DBRX: experts.mlp.{w1, v1, w2}, all [E * I, H]; gate = x w1^T, up = x v1^T, down is used
# untransposed: h w2. Canonical: gate_up stacks w1 over v1, down is w2^T. It takes [batch,
# sequence, H].


def _dbrx_blocks(module: Any, expert: int) -> tuple[Tensor, Tensor, Tensor]:
    at = slice(expert * module.ffn_hidden_size, (expert + 1) * module.ffn_hidden_size)
    return module.mlp.w1[at], module.mlp.v1[at], module.mlp.w2[at]


def _dbrx_projections(module: Any) -> tuple[ProjectionShape, ...]:
    inner, hidden = module.ffn_hidden_size, module.hidden_size
    return ProjectionShape("gate_up", 2 * inner, hidden, False), ProjectionShape(
        "down", hidden, inner, True
    )


def _dbrx_read(module: Any, expert: int) -> dict[str, Tensor]:
    w1, v1, w2 = _dbrx_blocks(module, expert)
    return {"gate_up": torch.cat([w1, v1]), "down": w2.T}


def _dbrx_write(module: Any, expert: int, weights: dict[str, Tensor]) -> None:
    w1, v1, w2 = _dbrx_blocks(module, expert)
    with torch.no_grad():
        w1.copy_(weights["gate_up"][: len(w1)])
        v1.copy_(weights["gate_up"][len(w1) :])
        w2.copy_(weights["down"].T)


def _dbrx_route(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Routed:
    flat = hidden.reshape(-1, hidden.shape[-1])
    return Routed(
        flat,
        index.reshape(-1, index.shape[-1]),
        weights.reshape(-1, weights.shape[-1]),
        tuple(hidden.shape[:-1]),
    )


DBRX = Kind(
    name="dbrx",
    matches=lambda module: type(module).__name__ == "DbrxExperts",
    experts=lambda module: int(module.num_experts),
    projections=_dbrx_projections,
    encoded=lambda module: ("mlp.w1", "mlp.v1", "mlp.w2"),
    read=_dbrx_read,
    write=_dbrx_write,
    biases=no_biases,
    ffn=lambda module, linear, biases, x, record: _gated(
        module, linear, module.mlp.activation_fn, x, record
    ),
    route=_dbrx_route,
)


# JetMoE: no experts module; every projection (of the feed-forward and of the attention) is a
# JetMoeParallelExperts of its own with weight [E, out, in], called with rows sorted by expert and
# the number of rows of each. Of which tokens they are, the router beside it says.


def _linear_ffn(
    module: Any, linear: Linear, biases: dict[str, Tensor], x: Tensor, record: Record | None
) -> Tensor:
    return linear("weight", x)


def _linear_write(module: Any, expert: int, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        module.weight[expert].copy_(weights["weight"])


def _linear_route(module: Any, inputs: Tensor, sizes: list[int]) -> Routed:
    experts = torch.arange(len(sizes), device=inputs.device)
    index = experts.repeat_interleave(torch.as_tensor(sizes, device=inputs.device))
    return Routed(inputs, index[:, None], None, tuple(inputs.shape[:-1]))


LINEAR = Kind(
    name="linear",
    matches=lambda module: type(module).__name__ == "JetMoeParallelExperts",
    experts=lambda module: int(module.num_experts),
    projections=lambda module: (
        ProjectionShape("weight", module.output_size, module.input_size, False),
    ),
    encoded=lambda module: ("weight",),
    read=lambda module, expert: {"weight": module.weight[expert]},
    write=_linear_write,
    biases=no_biases,
    ffn=_linear_ffn,
    route=_linear_route,
    router=(lambda path: path.rpartition(".")[0] + ".router", lambda output: output[1]),
    turn=lambda path: 0 if "self_attention" in path else 1,  # defined the other way round
)
