"""The experts of a layer as custom operators: fixed shapes, no host synchronization, torch.compile
and CUDA graphs work.

`experts_forward` replaces

    for n, k in pairs: out[n] += weights[n, k] * (down[e] @ gate(up[e] @ hidden[n] + bias_up[e]) +
        bias_down[e])   # e = index[n, k]

with both projections encoded. Routing stays on the device; every buffer's size is a function of the
number of tokens. Results are equal from run to run, and a token's result does not depend on the
other tokens of its batch as long as the number of tokens selects the same kernels
(`plan.batch_of`). On the CPU the operators run their torch twins, or the kernels if
TRITON_INTERPRET=1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from qmoe.kernels import matvec
from qmoe.kernels.launch import batch_of, plan_of
from qmoe.kernels.pack import PackedProjection
from qmoe.kernels.project import (
    FOUR_WARPS,
    INTERPRETED,
    gathered,
    inputs_type,
    make_groups,
    partial_sums,
    project,
    project_torch,
)

_BLOCK = 256
_HALF = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 0}


@dataclass(frozen=True)
class ExpertsPack:
    """Both projections of a layer's experts: `up` [E, rows = gate and up, cols = hidden], `down`
    [E, hidden, inner].
    """

    up: PackedProjection
    down: PackedProjection

    def __post_init__(self) -> None:
        if self.up.experts != self.down.experts or self.up.cols != self.down.rows:
            shapes = [(p.experts, p.rows, p.cols) for p in (self.up, self.down)]
            raise ValueError(
                f"projections do not fit together: {shapes[0]}, {shapes[1]} (experts, rows, cols)"
            )

    def to(self, device: torch.device | str) -> "ExpertsPack":
        """A copy on `device`."""
        return ExpertsPack(self.up.to(device), self.down.to(device))

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.up.nbytes() + self.down.nbytes()


@torch.library.custom_op("qmoe::project", mutates_args=())
def _project(
    x: Tensor, index: Tensor, fan: int, tensors: Sequence[Tensor], numbers: Sequence[int]
) -> Tensor:
    p = PackedProjection.from_parts(tensors, numbers)
    if x.device.type == "cpu" and not INTERPRETED:
        return project_torch(p, x, index, fan)
    return project(p, x, index, fan)


@_project.register_fake
def _(
    x: Tensor, index: Tensor, fan: int, tensors: Sequence[Tensor], numbers: Sequence[int]
) -> Tensor:
    return x.new_empty(index.numel(), numbers[1])


@torch.library.custom_op("qmoe::experts_silu", mutates_args=())
def _experts_silu(
    hidden: Tensor, index: Tensor, weights: Tensor, up: Sequence[Tensor], up_numbers: Sequence[int],
    down: Sequence[Tensor], down_numbers: Sequence[int],
) -> Tensor:  # fmt: skip
    pack = ExpertsPack(
        PackedProjection.from_parts(up, up_numbers), PackedProjection.from_parts(down, down_numbers)
    )
    if hidden.device.type == "cpu" and not INTERPRETED:
        return _twin(pack, hidden, index, weights, silu_gate)
    batch = batch_of(plan_of(hidden.device), *index.shape, pack.up.experts) if len(hidden) else 0
    return (
        _fused(pack, hidden, index, weights, batch)
        if batch
        else _composed(pack, hidden, index, weights, silu_gate)
    )


@_experts_silu.register_fake
def _(
    hidden: Tensor, index: Tensor, weights: Tensor, up: Sequence[Tensor], up_numbers: Sequence[int],
    down: Sequence[Tensor], down_numbers: Sequence[int],
) -> Tensor:  # fmt: skip
    return torch.empty_like(hidden)


def project_pairs(p: PackedProjection, x: Tensor, index: Tensor) -> Tensor:
    """``y[t] = W[index[t]] @ x[t]`` as a custom operator: kernels on a GPU, the twin on a CPU.

    Args:
        p: encoded projection, on x's device.
        x: bf16, fp16 or float32 [pairs, cols].
        index: int64 [pairs]; outside 0..E-1 gives zeros.

    Returns:
        [pairs, rows] in x's dtype.
    """
    out: Tensor = _project(x.contiguous(), index, 1, p.tensors(), p.numbers())
    return out


def silu_gate(h: Tensor) -> Tensor:
    """SwiGLU on concatenated gate and up: ``silu(h[:, :I]) * h[:, I:]``."""
    gate, up = h.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _fused(pack: ExpertsPack, hidden: Tensor, index: Tensor, weights: Tensor, batch: int) -> Tensor:
    """Small batches, SwiGLU: six launches from hidden to out."""
    up, down, plan = pack.up, pack.down, plan_of(hidden.device)
    tokens, top_k = index.shape
    expert, members, slots = make_groups(index.reshape(-1), up.experts, batch)
    partial = partial_sums(up, gathered(up, hidden, expert, members, top_k), expert, plan)
    xs = torch.empty(
        len(expert), down.pieces, down.width, batch, dtype=inputs_type(hidden), device=hidden.device
    )
    matvec.silu_inputs[(triton.cdiv(down.width, _BLOCK), down.pieces, len(expert))](
        partial, expert, members, down.columns, down.scales, xs, up.experts, down.cols,
        down.columns.shape[2], down.width,
        SLOTS=partial.shape[1], B=batch, BLOCK=_BLOCK, HALF=_HALF[hidden.dtype], **FOUR_WARPS,
    )  # fmt: skip
    partial = partial_sums(down, xs, expert, plan)
    out = torch.empty_like(hidden)
    matvec.sum_tokens[(triton.cdiv(down.rows, _BLOCK), tokens)](
        partial,
        slots,
        weights,
        out,
        down.rows,
        K=top_k,
        SLOTS=partial.shape[1],
        B=batch,
        BLOCK=_BLOCK,
        **FOUR_WARPS,
    )
    return out


def _composed(
    pack: ExpertsPack, hidden: Tensor, index: Tensor, weights: Tensor, gate: Callable[[Tensor],
    Tensor],
    bias_up: Tensor | None = None, bias_down: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Any batch, any gate, biases: the projections as operators, the rest in torch."""
    tokens, top_k = index.shape
    flat = index.reshape(-1)
    safe = flat.clamp(0, pack.up.experts - 1)
    h = _project(hidden, flat, top_k, pack.up.tensors(), pack.up.numbers())
    if bias_up is not None:
        h = h + bias_up[safe]
    y = _project(gate(h).contiguous(), flat, 1, pack.down.tensors(), pack.down.numbers())
    if bias_down is not None:
        y = y + bias_down[safe]
    used = (flat >= 0) & (flat < pack.up.experts)
    share = torch.where(used, weights.reshape(-1).float(), 0.0)
    out: Tensor = (y.float() * share[:, None]).view(tokens, top_k, -1).sum(1).to(hidden.dtype)
    return out


def _twin(
    pack: ExpertsPack,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    gate: Callable[[Tensor], Tensor],
) -> Tensor:
    """What `experts_forward` means, in torch."""
    tokens, top_k = index.shape
    h = project_torch(pack.up, hidden, index.reshape(-1), top_k)
    y = project_torch(pack.down, gate(h), index.reshape(-1), 1).float().view(tokens, top_k, -1)
    return (y * weights.float()[:, :, None]).sum(1).to(hidden.dtype)


def experts_forward(
    pack: ExpertsPack,
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    apply_gate: Callable[[Tensor], Tensor] | str = "silu",
    bias_up: Tensor | None = None,
    bias_down: Tensor | None = None,
) -> Tensor:
    """The experts' output for routed tokens.

    Args:
        pack: encoded projections, on the tokens' device.
        hidden: bf16, fp16 or float32 [N, hidden].
        top_k_index: integer [N, k], expert of each pair; outside 0..E-1 contributes nothing.
        top_k_weights: floating [N, k].
        apply_gate: [pairs, rows of up] -> [pairs, cols of down], elementwise over pairs; "silu" is
            SwiGLU on concatenated
            gate and up, fused into the kernels for small batches.
        bias_up, bias_down: [E, rows] of each projection, or None.

    Returns:
        [N, hidden] in hidden's dtype.

    Raises:
        ValueError: shapes, types or devices that do not fit, or an unknown gate.
    """
    _check(pack, hidden, top_k_index, top_k_weights)
    hidden = hidden.contiguous()
    if isinstance(apply_gate, str) and apply_gate != "silu":
        raise ValueError(f'gate "{apply_gate}" is not known; pass a function or "silu"')
    if apply_gate == "silu" and bias_up is None and bias_down is None:
        if pack.up.rows != 2 * pack.down.cols:
            raise ValueError(
                f"gate and up of {pack.up.rows} rows do not match down's {pack.down.cols} columns"
            )
        up, down = pack.up, pack.down
        out: Tensor = _experts_silu(
            hidden,
            top_k_index.contiguous(),
            top_k_weights.contiguous(),
            up.tensors(),
            up.numbers(),
            down.tensors(),
            down.numbers(),
        )
        return out
    gate = silu_gate if isinstance(apply_gate, str) else apply_gate
    return _composed(pack, hidden, top_k_index, top_k_weights, gate, bias_up, bias_down)


def _check(pack: ExpertsPack, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
    if hidden.ndim != 2 or hidden.shape[1] != pack.up.cols or hidden.dtype not in _HALF:
        raise ValueError(
            f"hidden must be bf16, fp16 or float32 [N, {pack.up.cols}], "
            f"got {hidden.dtype} {tuple(hidden.shape)}"
        )
    if index.ndim != 2 or index.shape[0] != hidden.shape[0] or index.shape != weights.shape:
        raise ValueError(
            f"routing must be [N, k] twice, N = {hidden.shape[0]}: "
            f"got {tuple(index.shape)} and {tuple(weights.shape)}"
        )
    devices = {t.device for t in (hidden, index, weights, pack.up.words, pack.down.words)}
    if len(devices) > 1:
        raise ValueError(f"tensors are on different devices: {sorted(str(d) for d in devices)}")
