"""Experts classes under transformers' ``@use_experts_implementation``: 64 model folders share one
interface.

Weights are 3-D parameters ``gate_up_proj`` (or ``up_proj``) and ``down_proj``; flags on the
instance say whether they are transposed, biased, gated, normalised. The gate function is always
the module's own ``_apply_gate``: several families clamp, shift or interleave there. Step3p7 has
the interface without the decorator, hence without flags; the defaults are its truth.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.models.families.kind import Kind, Linear, Record, Routed
from qmoe.types import ProjectionShape


def _flag(module: Any, name: str, default: bool = False) -> bool:
    return bool(getattr(module, name, default))


def _names(module: Any) -> dict[str, str]:
    """{projection name: parameter name}."""
    first = "gate_up" if _flag(module, "has_gate", True) else "up"
    return {first: f"{first}_proj", "down": "down_proj"}


def _matches(module: nn.Module) -> bool:
    return hasattr(module, "_apply_gate") and isinstance(
        getattr(module, "down_proj", None), nn.Parameter
    )


def _projections(module: Any) -> tuple[ProjectionShape, ...]:
    out = []
    for name, parameter in _names(module).items():
        _, a, b = getattr(module, parameter).shape
        rows, cols = (b, a) if _flag(module, "is_transposed") else (a, b)
        out.append(ProjectionShape(name, rows, cols, inner=name == "down"))
    return tuple(out)


def _read(module: Any, expert: int) -> dict[str, Tensor]:
    turned = _flag(module, "is_transposed")
    pairs = (
        (name, getattr(module, parameter)[expert]) for name, parameter in _names(module).items()
    )
    return {name: w.T if turned else w for name, w in pairs}


def _write(module: Any, expert: int, weights: dict[str, Tensor]) -> None:
    turned = _flag(module, "is_transposed")
    with torch.no_grad():
        for name, parameter in _names(module).items():
            getattr(module, parameter)[expert].copy_(weights[name].T if turned else weights[name])


def _biases(module: Any, owner: Any, expert: int) -> dict[str, Tensor]:
    if not _flag(module, "has_bias"):
        return {}
    return {
        name: getattr(owner, f"{parameter}_bias")[expert]
        for name, parameter in _names(module).items()
    }


def _ffn(
    module: Any, linear: Linear, biases: dict[str, Tensor], x: Tensor, record: Record | None
) -> Tensor:
    first = next(iter(_names(module)))
    h = linear(first, x)
    if first in biases:
        h = h + biases[first].to(h.dtype)
    h = module._apply_gate(h) if first == "gate_up" else module.act_fn(h)
    if record is not None:
        record(h)
    y = linear("down", h)
    if "down" in biases:
        y = y + biases["down"].to(y.dtype)
    return module.post_expert_norm(y) if _flag(module, "has_post_expert_norm") else y


def _route(module: Any, *args: Any, **kwargs: Any) -> Routed:
    if kwargs:
        args = inspect.signature(type(module).forward).bind(module, *args, **kwargs).args[1:]
    hidden, index, weights = args
    shape = tuple(hidden.shape[:-1])
    flat = hidden.reshape(-1, hidden.shape[-1])
    return Routed(
        flat,
        index.reshape(-1, index.shape[-1]).long(),
        weights.reshape(-1, weights.shape[-1]),
        shape,
    )


FUSED = Kind(
    name="fused",
    matches=_matches,
    experts=lambda module: int(module.down_proj.shape[0]),
    projections=_projections,
    encoded=lambda module: tuple(_names(module).values()),
    read=_read,
    write=_write,
    biases=_biases,
    ffn=_ffn,
    route=_route,
)
