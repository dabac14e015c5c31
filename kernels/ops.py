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
from typing import Any

import torch
from torch import Tensor

from qmoe.kernels import inputs, sums
from qmoe.kernels.launch import batch_of, plan_of
from qmoe.kernels.pack import PackedProjection
from qmoe.kernels.project import (
    BLOCK,
    first_sums,
    guard,
    inputs_type,
    launched,
    make_groups,
    partial_sums,
    project,
    runs_kernels,
    weights,
)
from qmoe.kernels.twins import project_torch, weights_torch

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
    if not runs_kernels(x.device):
        return project_torch(p, x, index, fan)
    with guard(x.device):
        return project(p, x, index, fan)


@_project.register_fake
def _(
    x: Tensor, index: Tensor, fan: int, tensors: Sequence[Tensor], numbers: Sequence[int]
) -> Tensor:
    return x.new_empty(index.numel(), numbers[1])


@torch.library.custom_op("qmoe::project_back", mutates_args=())
def _project_back(
    y: Tensor, index: Tensor, fan: int, tensors: Sequence[Tensor], numbers: Sequence[int]
) -> Tensor:
    """``x[n] = sum over pairs t of row n of W[index[t]].T @ y[t]``: the gradient of `_project`.

    Every expert that has a pair is decoded once; which ones is read back by the host, so this is
    not for a graph.
    """
    p = PackedProjection.from_parts(tensors, numbers)
    x = torch.zeros(y.shape[0] // fan, p.cols, dtype=torch.float32, device=y.device)
    with guard(y.device):
        for e in index.unique().tolist():
            if 0 <= e < p.experts:
                t = torch.where(index == e)[0]
                dense = weights(p, e) if runs_kernels(y.device) else weights_torch(p, e)
                x.index_add_(0, t // fan, y[t].float() @ dense)
    return x.to(y.dtype)


@_project_back.register_fake
def _(
    y: Tensor, index: Tensor, fan: int, tensors: Sequence[Tensor], numbers: Sequence[int]
) -> Tensor:
    return y.new_empty(y.shape[0] // fan, numbers[2])


def _keep_project(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, ctx.fan, ctx.tensors, ctx.numbers = inputs
    ctx.save_for_backward(index)


def _project_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (index,) = ctx.saved_tensors
    back = _project_back(grad.contiguous(), index, ctx.fan, ctx.tensors, ctx.numbers)
    return back, None, None, [None] * len(ctx.tensors), None


_project.register_autograd(_project_gradient, setup_context=_keep_project)


@torch.library.custom_op("qmoe::experts_silu", mutates_args=())
def _experts_silu(
    hidden: Tensor, index: Tensor, weights: Tensor, up: Sequence[Tensor], up_numbers: Sequence[int],
    down: Sequence[Tensor], down_numbers: Sequence[int],
) -> Tensor:  # fmt: skip
    pack = ExpertsPack(
        PackedProjection.from_parts(up, up_numbers), PackedProjection.from_parts(down, down_numbers)
    )
    return _swiglu(pack, hidden, index, weights)


def _swiglu(pack: ExpertsPack, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """What the operator `experts_silu` does."""
    if not runs_kernels(hidden.device):
        return twin(pack, hidden, index, weights, silu_gate)
    with guard(hidden.device):
        plan = plan_of(hidden.device)
        batch = batch_of(plan, *index.shape, pack.up.experts) if len(hidden) else 0
        if batch:
            return _fused(pack, hidden, index, weights, batch)
        return _composed(pack, hidden, index, weights, silu_gate)


def _needs_operator(*inputs: Tensor) -> bool:
    """Whether somebody looks on: a compiler, or a gradient. Otherwise the operator's 26 tensors
    need not pass the dispatcher, which costs as much as the launches.
    """
    if torch.compiler.is_compiling() or any(type(t) is not Tensor for t in inputs):
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in inputs)


@_experts_silu.register_fake
def _(
    hidden: Tensor, index: Tensor, weights: Tensor, up: Sequence[Tensor], up_numbers: Sequence[int],
    down: Sequence[Tensor], down_numbers: Sequence[int],
) -> Tensor:  # fmt: skip
    return torch.empty_like(hidden)


def _keep_experts(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, index, weights, *ctx.parts = inputs
    ctx.save_for_backward(hidden, index, weights)


def _experts_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Recomputes what lies between the projections; nothing but the inputs was kept."""
    hidden, index, weights = ctx.saved_tensors
    up, down = ctx.parts[:2], ctx.parts[2:]
    top_k, flat, experts = index.shape[1], index.reshape(-1), up[1][0]
    h = _project(hidden, flat, top_k, *up)
    gate, linear = h.float().chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    middle = gate * sigmoid * linear
    used = (flat >= 0) & (flat < experts)
    of_pair = grad.repeat_interleave(top_k, 0)
    grad_weights = None
    if ctx.needs_input_grad[2]:
        y = _project(middle.to(hidden.dtype), flat, 1, *down)
        dot = (y.float() * of_pair.float()).sum(1)
        grad_weights = torch.where(used, dot, 0.0).view_as(weights).to(weights.dtype)
    grad_hidden = None
    if ctx.needs_input_grad[0]:
        share = torch.where(used, weights.reshape(-1).float(), 0.0)
        grad_y = (of_pair.float() * share[:, None]).to(hidden.dtype)
        back = _project_back(grad_y, flat, 1, *down).float()
        of_gate = back * linear * sigmoid * (1 + gate * (1 - sigmoid))
        both = torch.cat([of_gate, back * gate * sigmoid], 1).to(hidden.dtype)
        grad_hidden = _project_back(both, flat, top_k, *up)
    weightless = [None] * len(up[0]), None, [None] * len(down[0]), None
    return grad_hidden, None, grad_weights, *weightless


_experts_silu.register_autograd(_experts_gradient, setup_context=_keep_experts)


def project_pairs(p: PackedProjection, x: Tensor, index: Tensor) -> Tensor:
    """``y[t] = W[index[t]] @ x[t]`` as a custom operator: kernels on a GPU, the twin on a CPU.

    Args:
        p: encoded projection, on x's device.
        x: bf16, fp16 or float32 [pairs, cols].
        index: int64 [pairs]; outside 0..E-1 gives zeros.

    Returns:
        [pairs, rows] in x's dtype.
    """
    out: Tensor = _project(x.contiguous(), index.contiguous(), 1, p.tensors(), p.numbers())
    return out


def silu_gate(h: Tensor) -> Tensor:
    """SwiGLU on concatenated gate and up: ``silu(h[:, :I]) * h[:, I:]``."""
    gate, up = h.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _fused(pack: ExpertsPack, hidden: Tensor, index: Tensor, weights: Tensor, batch: int) -> Tensor:
    """Small batches, SwiGLU: four launches from hidden to out for one token, else six."""
    up, down, plan = pack.up, pack.down, plan_of(hidden.device)
    tokens, top_k = index.shape
    groups = make_groups(index.reshape(-1), up.experts, batch)
    count = groups.expert.numel()
    partial = first_sums(up, hidden, groups, top_k, plan, dependent=not groups.direct)
    xs = torch.empty(
        count, down.pieces, down.width, batch, dtype=inputs_type(hidden), device=hidden.device
    )
    inputs.silu_inputs[(count, down.pieces, -(-down.width // BLOCK))](
        partial, groups.expert, groups.slots if groups.members is None else groups.members,
        down.columns, down.scales, xs, up.experts, down.cols, down.stored, down.width,
        SLOTS=partial.shape[1], B=batch, BLOCK=BLOCK, HALF=_HALF[hidden.dtype], PDL=plan.pdl,
        **launched(plan, True),
    )  # fmt: skip
    partial = partial_sums(down, xs, groups, plan, dependent=True)
    out = torch.empty_like(hidden)
    sums.sum_tokens[(tokens, -(-down.rows // BLOCK))](
        partial, groups.slots, weights, out, down.experts, down.rows,
        K=top_k, SLOTS=partial.shape[1], B=batch, BLOCK=BLOCK, DIRECT=groups.direct, PDL=plan.pdl,
        **launched(plan, True),
    )  # fmt: skip
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


def twin(
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
        index, weights = top_k_index.contiguous(), top_k_weights.contiguous()
        if not _needs_operator(hidden, weights):
            return _swiglu(pack, hidden, index, weights)
        up, down = pack.up, pack.down
        out: Tensor = _experts_silu(
            hidden,
            index,
            weights,
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
