"""A model's discrete decisions: recorded in one run, taken over in another.

Where two experts are nearly equal to a router, any rounding of the weights before it may turn the
decision, and one token then differs by a whole expert. A random model has many such tokens. So how
far a compressed model's numbers are from the source's is measured with the source's decisions, and
how many of its own are others is counted apart.
"""

from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_OPS = torch.ops.aten
# operators that decide, by where in their output the decision is (None: it is the output)
_DECIDE: dict[Any, int | None] = {
    _OPS.topk.default: 1,
    _OPS.sort.default: 1,
    _OPS.sort.stable: 1,
    _OPS.max.dim: 1,
    _OPS.argmax.default: None,
}
_SORTS = (_OPS.sort.default, _OPS.sort.stable)


class Decisions(TorchDispatchMode):
    """While open, notes every choice of largest elements among floating point numbers.

    Attributes:
        made: (operator, int64 indices that it chose) of every call, in order.
    """

    def __init__(self, known: Self | None = None) -> None:
        """Args: known: of the same forward of a model with the same modules; its choices are made
        instead, with the values that stand there."""
        super().__init__()
        self.made: list[tuple[Any, Tensor]] = []
        self._known = known

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func not in _DECIDE or not args[0].is_floating_point():
            return out
        at = _DECIDE[func]
        index = out if at is None else out[at]
        self.made.append((func, index.clone()))
        if self._known is None:
            return out
        same, other = self._known.made[len(self.made) - 1]
        assert same is func
        assert other.shape == index.shape
        if at is None:
            return other
        dim = _argument("dim", func, args, kwargs or {})
        if index.ndim == args[0].ndim:
            return args[0].gather(dim, other), other
        return args[0].gather(dim, other.unsqueeze(dim)).squeeze(dim), other

    def differing(self, other: Self) -> float:
        """Share of the elements chosen that the other did not choose, too; a sort chooses none."""
        missed = total = 0
        for (func, ours), (same, theirs) in zip(self.made, other.made, strict=True):
            assert same is func
            if func not in _SORTS:
                missed, total = missed + _missed(ours, theirs), total + ours.numel()
        return missed / max(1, total)


def _argument(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An argument of an operator's call, given or by default."""
    at, stated = next((i, a) for i, a in enumerate(func._schema.arguments) if a.name == name)
    given = not stated.kwarg_only and at < len(args)
    return args[at] if given else kwargs.get(name, stated.default_value)


def _missed(ours: Tensor, theirs: Tensor) -> int:
    """Choices of a row of one that are not among those of the row of the other."""
    a, b = (x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x.reshape(-1, 1) for x in (ours, theirs))
    return int((a[:, :, None] != b[:, None, :]).all(-1).sum())
