"""Encoded experts on the CPU as a custom operator, for `torch.compile`: one node of the graph,
whose insides are not traced. The module is found by its number, since operators take tensors and
numbers.

Gradients flow to the inputs, the routing weights and the module's own parameters (biases, norms).
"""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

# (module, hidden, index, weights or None) -> [n, width]
Run = Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]
_NUMBERS = itertools.count()
_MODULES: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()


def register(module: nn.Module) -> int:
    """A number by which the operators find the module for as long as it lives.

    It has `run_plain`, a `Run` without the module, and `width`, the columns of what that returns.
    """
    number = next(_NUMBERS)
    _MODULES[number] = module
    return number


def apply(
    number: int, hidden: Tensor, index: Tensor, weights: Tensor | None, parameters: list[Tensor]
) -> Tensor:
    """``run_plain(hidden, index, weights)`` of a registered module, as one operator.

    Args:
        number: from `register`.
        hidden: [n, cols].
        index: int64 [n, slots].
        weights: [n, slots] or None.
        parameters: the module's own, as far as they may have gradients.

    Returns:
        [n, width].
    """
    out: Tensor = _experts(hidden, index, weights, parameters, number)
    return out


@torch.library.custom_op("qmoe::encoded_experts", mutates_args=())
def _experts(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor | None,
    parameters: Sequence[Tensor],
    number: int,
) -> Tensor:
    with torch.no_grad():
        out: Tensor = _MODULES[number].run_plain(hidden, index, weights)  # type: ignore[operator]
        return out


@_experts.register_fake
def _(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor | None,
    parameters: Sequence[Tensor],
    number: int,
) -> Tensor:
    width: Any = _MODULES[number].width
    return hidden.new_empty(hidden.shape[0], width)


@torch.library.custom_op("qmoe::encoded_experts_backward", mutates_args=())
def _backward(
    grad: Tensor,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor | None,
    parameters: Sequence[Tensor],
    number: int,
) -> list[Tensor]:
    module: Any = _MODULES[number]
    own = [p for _, p in module.own_parameters()]

    def run() -> list[Tensor]:
        x = hidden.detach().requires_grad_()
        share = None if weights is None else weights.detach().requires_grad_()
        inputs = [x, *([] if share is None else [share]), *own]
        with torch.enable_grad():
            y = module.run_plain(x, index, share)
        wanted = [t for t in inputs if t.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, grad, allow_unused=True))
        grads = [next(found) if t.requires_grad else None for t in inputs]
        return [
            torch.zeros_like(t) if g is None else g.clone()
            for g, t in zip(grads, inputs, strict=True)
        ]

    # An operator's body runs below autograd; a fresh thread runs on top of it.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


@_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor | None,
    parameters: Sequence[Tensor],
    number: int,
) -> list[Tensor]:
    inputs = [hidden, *([] if weights is None else [weights]), *parameters]
    return [torch.empty_like(t) for t in inputs]


def _keep(ctx: Any, inputs: Any, output: Tensor) -> None:
    hidden, index, weights, parameters, ctx.number = inputs
    ctx.weighted = weights is not None
    ctx.save_for_backward(hidden, index, *([weights] if ctx.weighted else []), *parameters)


def _differentiate(ctx: Any, grad: Tensor) -> Any:
    hidden, index, *rest = ctx.saved_tensors
    weights = rest.pop(0) if ctx.weighted else None
    first, *others = _backward(grad, hidden, index, weights, rest, ctx.number)
    share = others.pop(0) if ctx.weighted else None
    return first, None, share, others, None


_experts.register_autograd(_differentiate, setup_context=_keep)
