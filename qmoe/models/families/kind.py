"""What every shape of experts module has in common. Knows nothing about particular model families
or files.

An *experts module* holds E small feed-forward networks and is called with the router's decisions.
Three things differ between families: how the module stores its matrices, how it is called, and how
one expert computes. A `Kind` states all three. Matrices are always handed out *canonical*: [rows =
outputs, cols = inputs], rows in the module's own order (so that an interleaved gate/up projection
stays interleaved and the module's own gate function applies unchanged).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.types import ProjectionShape

Linear = Callable[[str, Tensor], Tensor]  # (projection name, x [n, cols]) -> [n, rows], no bias
Record = Callable[[Tensor], None]  # receives the input of the down projection, [n, intermediate]


@dataclass(frozen=True)
class Routed:
    """A call of an experts module in the one form that all kinds share.

    ``y[i] = sum over slots s of weights[i, s] * ffn[index[i, s]](hidden[i])``, slots with ``index
    >= experts`` left out.

    Attributes:
        hidden: float [n, cols].
        index: int64 [n, slots].
        weights: float [n, slots], or None if all are 1.
        shape: leading dimensions of the result; the last is the width of the experts' output.
        token: int64 [n], of which token each row is, where rows are not the tokens in order; None
            where they are, or where only the router knows (see `Kind.router`).
    """

    hidden: Tensor
    index: Tensor
    weights: Tensor | None
    shape: tuple[int, ...]
    token: Tensor | None = None

    def by_expert(self, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields (expert, rows int64 [m], slots int64 [m]) for every expert that has tokens, rows
        ascending."""
        flat = self.index.reshape(-1)
        order = torch.sort(flat, stable=True)
        first = torch.searchsorted(
            order.values, torch.arange(experts + 1, device=flat.device)
        ).tolist()
        slots = self.index.shape[1]
        for e in range(experts):
            if first[e] < first[e + 1]:
                at = order.indices[first[e] : first[e + 1]]
                yield e, at // slots, at % slots

    def run(self, experts: int, ffn: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Runs ``ffn(expert, x [m, cols]) -> [m, width]`` for every expert with tokens and adds up
        in float32.

        Returns:
            [*shape, width] in the dtype of `hidden`. The order of additions is fixed, so results
            are repeatable.
        """
        out: Tensor | None = None
        for e, rows, slots in self.by_expert(experts):
            y = ffn(e, self.hidden[rows])
            if self.weights is not None:
                y = y * self.weights[rows, slots, None]
            if out is None:
                out = torch.zeros(
                    len(self.hidden), y.shape[1], dtype=torch.float32, device=y.device
                )
            out.index_add_(0, rows, y.float())
        if out is None:  # nothing was routed; an empty batch tells the width
            width = ffn(0, self.hidden[:0]).shape[1]
            out = torch.zeros(len(self.hidden), width, device=self.hidden.device)
        return out.to(self.hidden.dtype).reshape(*self.shape, out.shape[1])


@dataclass(frozen=True)
class Kind:
    """One shape of experts module, as functions of the module (which may be on the meta device
    where only shapes are asked).

    Attributes:
        name: stored in config.json; a reader of the format finds the kind by it.
        matches: whether a module is of this kind.
        experts: number of experts.
        projections: the matrices of every expert.
        encoded: names of the parameters, relative to the module, that the encoded form replaces.
        read: (module, expert) -> {projection: canonical matrix}, views where possible.
        write: (module, expert, {projection: canonical matrix}) -> None, the inverse of `read`.
        biases: (module, owner, expert) -> {projection: bias [rows]}; empty for most kinds. `owner`
            has the parameters: the module itself, or the encoded module that took them over.
        ffn: (module, linear, biases, x, record) -> [n, width], one expert.
        route: (module, *arguments of its forward) -> Routed.
        repair: the module's own forward is wrong in the supported transformers releases and must
            be replaced.
        router: (module path) -> path of the module that orders the rows, and (its output) -> int64
            [n], of which token each is; None where the arguments of the forward tell.
        turn: (module path) -> when a block calls it, where a block has several and does not call
            them in the order of their definition.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    experts: Callable[[Any], int]
    projections: Callable[[Any], tuple[ProjectionShape, ...]]
    encoded: Callable[[Any], tuple[str, ...]]
    read: Callable[[Any, int], dict[str, Tensor]]
    write: Callable[[Any, int, dict[str, Tensor]], None]
    biases: Callable[[Any, Any, int], dict[str, Tensor]]
    ffn: Callable[[Any, Linear, dict[str, Tensor], Tensor, Record | None], Tensor]
    route: Callable[..., Routed]
    repair: bool = False
    router: tuple[Callable[[str], str], Callable[[Any], Tensor]] | None = None
    turn: Callable[[str], int] = lambda path: 0

    def __reduce__(self) -> tuple[Any, ...]:
        """By name, since functions of a kind cannot be pickled: models that refer to it can."""
        return _kind_named, (self.name,)


def _kind_named(name: str) -> "Kind":
    from qmoe.models.families.find import KINDS

    return KINDS[name]


def no_biases(module: Any, owner: Any, expert: int) -> dict[str, Tensor]:
    """For kinds whose experts have no bias."""
    return {}


class Bias(nn.Module):
    """A bias in a module of its own, as its name in the checkpoint says, fetched by calling it.

    Called rather than read, because offloading hooks bring a module's parameters in only around its
    forward.
    """

    def __init__(self, bias: nn.Parameter) -> None:
        super().__init__()
        self.bias = bias

    def forward(self) -> Tensor:
        """The bias, where the hooks of this module put it."""
        return self.bias
