"""The kernels as a backend of encoded experts: nothing is unpacked, routing stays on the device.

Registered for CUDA devices when a model is loaded. A layer's streams are laid out for the kernels
on its first call (and again if its parameters moved); that is the only host work.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qmoe.inference.experts import BACKENDS, EncodedExperts
from qmoe.kernels.ops import ExpertsPack, experts_forward, project_pairs
from qmoe.kernels.pack import PackedProjection, pack_projection

_PACK = "_kernel_pack"


@dataclass(frozen=True)
class _Pack:
    """A layer as the kernels want it.

    Attributes:
        key: the parameters it was made from.
        projections: by name.
        biases: [E, rows] by projection name; empty for most families.
        fused: SwiGLU on concatenated gate and up without biases or norms, which has kernels of
            its own.
    """

    key: tuple[Tensor, Tensor]
    projections: dict[str, PackedProjection]
    biases: dict[str, Tensor]
    fused: ExpertsPack | None


def run_kernels(
    module: EncodedExperts, hidden: Tensor, index: Tensor, weights: Tensor | None
) -> Tensor:
    """The experts of a layer through `qmoe.kernels`; same contract as `experts.run_on_cpu`.

    Args:
        module: the encoded experts.
        hidden: [n, cols] bf16, fp16 or float32.
        index: int64 [n, slots]; values >= `num_experts` are skipped.
        weights: [n, slots] or None for 1.

    Returns:
        [n, width], dtype and device of `hidden`.
    """
    pack = _pack(module, hidden.device)
    share = torch.ones_like(index, dtype=torch.float32) if weights is None else weights
    if pack.fused is not None:
        return experts_forward(pack.fused, hidden, index, share)
    flat = index.reshape(-1)
    used = (flat >= 0) & (flat < module.num_experts)
    safe = torch.where(used, flat, 0)
    x = hidden.repeat_interleave(index.shape[1], 0)
    y = module.kind.ffn(
        module.host,
        lambda name, h: project_pairs(pack.projections[name], h, flat),
        {name: bias[safe] for name, bias in pack.biases.items()},
        x,
        None,
    )
    y = y.float() * torch.where(used, share.reshape(-1).float(), 0.0)[:, None]
    return y.view(*index.shape, -1).sum(1).to(hidden.dtype)


def _pack(module: EncodedExperts, device: torch.device) -> _Pack:
    key = (module.stream, module.offsets)
    found: _Pack | None = module.__dict__.get(_PACK)
    if found is not None and all(a is b for a, b in zip(found.key, key, strict=True)):
        return found
    streams = module.encoded()
    projections = {}
    for j, p in enumerate(module.layout.projections):
        tables = [streams.tables(e, j) for e in range(module.num_experts)]
        matrices = [(t, streams.matrix(e, j, t)) for e, t in enumerate(tables)]
        projections[p.name] = pack_projection(matrices).to(device)
    rows = [module.kind.biases(module.host, module, e) for e in range(module.num_experts)]
    biases = {name: torch.stack([r[name] for r in rows]).to(device) for name in rows[0]}
    fused = None
    if _plain_swiglu(module) and not biases:
        fused = ExpertsPack(projections["gate_up"], projections["down"])
    made = _Pack(key, projections, biases, fused)
    if not module.offloaded:
        module.__dict__[_PACK] = made
    return made


def _plain_swiglu(module: EncodedExperts) -> bool:
    """Whether the experts are ``down(silu(gate) * up)`` with gate rows first and nothing else."""
    host: Any = module.host
    names = [p.name for p in module.layout.projections]
    if module.kind.name != "fused" or names != ["gate_up", "down"]:
        return False
    default = "_default_apply_gate"
    return (
        getattr(type(host)._apply_gate, "__name__", "") == default
        and type(getattr(host, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
        and getattr(host, "is_concatenated", True)
        and not getattr(host, "has_post_expert_norm", False)
    )


def register() -> None:
    """Lets CUDA tensors take the kernels."""
    BACKENDS["cuda"] = run_kernels
