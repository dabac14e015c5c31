"""What the experts of one layer see: parked routing decisions, rows per expert, Hessians.

The router of a layer runs once over all calibration batches; its decisions and the hidden states
are parked. Then experts are taken one bounded group at a time, each read from disk once, and their
outputs are stored per (token, slot) so that the sum over slots has one order, whatever the
grouping. Knows nothing about solvers or the codec.

Memory: the parked hidden states [tokens, hidden] and outputs [tokens, slots, hidden] live in the
`ActivationStore`; beyond that, one expert's rows at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.calib.activations import ActivationStore
from qmoe.calib.walk import Walk, stop_forward
from qmoe.errors import NonFiniteError
from qmoe.models.families.find import kind_of, layout_of, route
from qmoe.models.families.kind import Routed
from qmoe.models.streamed import BlockRef
from qmoe.system.processes import World

BATCH = 1 << 32  # tokens that a batch may have, in the numbers of tokens
# rows of one partial Hessian product; fixed, since it decides the rounding, and few, since MKL
# shares out the sum over a thousand rows among its threads, in another order for each number
_CHUNK = 256


@dataclass
class Parked:
    """One stream's tokens at one experts module.

    Attributes:
        hidden: [N, H] inputs of the experts, compute dtype.
        index: [N, k] int32 expert of each slot; E or more means the slot is unused.
        weight: [N, k] float32 routing weights.
        rows: tokens of each batch, in order (they add up to N).
        output: [N, k, H] outputs times routing weight, filled group by group.
        token: [N] int64, of which token each row is, `BATCH` times its batch added; None where rows
            are the tokens in order.
    """

    hidden: Tensor
    index: Tensor
    weight: Tensor
    rows: list[int]
    output: Tensor
    token: Tensor | None = None
    _order: Tensor = field(init=False)
    _start: Tensor = field(init=False)

    def __post_init__(self) -> None:
        flat = self.index.flatten().long()
        self._order = torch.argsort(flat, stable=True)
        largest = int(flat.max()) if len(flat) else 0
        self._start = torch.searchsorted(flat[self._order], torch.arange(largest + 3))

    def slots(self, expert: int) -> tuple[Tensor, Tensor]:
        """(token, slot) index vectors of the rows routed to an expert, in token order."""
        if expert + 1 >= len(self._start):
            empty = torch.zeros(0, dtype=torch.long)
            return empty, empty
        at = self._order[self._start[expert] : self._start[expert + 1]]
        k = self.index.shape[1]
        return torch.div(at, k, rounding_mode="floor"), at % k

    def partners(self, other: "Parked", experts: int) -> Tensor | None:
        """Which rows of another stream are the same tokens at the same experts.

        A router that orders rows by its decisions hands out other rows once it decides otherwise,
        so the same number means nothing there. A token that the other stream sent elsewhere has a
        partner only if its rows are all the same there (before experts that take the token itself).

        Args:
            other: the same batches in another stream.
            experts: their number.

        Returns:
            int64 [N], rows of `other`, -1 for none; None where both streams' rows are the tokens in
            order.
        """
        if self.token is None or other.token is None:
            return None
        width = experts + 1
        ours, theirs = (p.index[:, 0].long().clamp(max=experts) for p in (self, other))
        pairs = torch.where(theirs < experts, other.token * width + theirs, -1)  # -1: not used
        found = _find(self.token * width + ours, pairs)
        if other.alike():
            found = torch.where(found < 0, _find(self.token, other.token), found)
        return found

    def alike(self) -> bool:
        """Whether all rows of a token are the same, and some token has several."""
        if self.token is None:
            return False
        order = torch.argsort(self.token, stable=True)
        again = torch.nonzero(self.token[order][1:] == self.token[order][:-1])[:, 0]
        first, second = order[again].split(_CHUNK), order[again + 1].split(_CHUNK)
        return len(again) > 0 and all(
            torch.equal(self.hidden[a], self.hidden[b]) for a, b in zip(first, second, strict=True)
        )

    def spread(self, world: World, experts: range, owner: int) -> None:
        """Sends the outputs of some experts, which one process has filled in, to all that are apart
        from it."""
        for expert in experts:
            token, slot = self.slots(expert)
            values = self.output[token, slot]
            world.spread(values, owner)
            self.output[token, slot] = values

    def release(self, store: ActivationStore) -> None:
        """Gives the tensors back to the store's budget."""
        for t in (self.hidden, self.index, self.weight, self.output, self.token):
            if t is not None:
                store.release(t)


def park(
    walk: Walk,
    block: BlockRef,
    path: str,
    module: nn.Module,
    width: int,
    store: ActivationStore,
    world: World | None = None,
) -> Parked:
    """Runs every batch up to the experts of `block` and keeps what the router hands them.

    Args:
        walk: the stream; `block` is resident without the experts' matrices.
        path: module path of the experts, for messages.
        module: the experts. Its forward is overridden for the time of the call.
        width: outputs of an expert.
        store: where the hidden states and the outputs to come are kept.
        world: the processes that share the batches; each runs its own, all see the result.

    Returns:
        The decisions; of no rows if no batch comes to the experts.

    Raises:
        NonFiniteError: NaN or Inf in the hidden states, with the module's path.
    """
    world = world or World()
    seen = _seen(walk, block, path, module, store)
    found = {
        n: (len(h), h.shape[1], i.shape[1], h.dtype, t is not None)
        for n, (h, i, _, t) in seen.items()
    }
    owner: dict[int, int] = {}
    for rank, other in enumerate(world.collect(found, f"routing of {path}")):
        found |= other
        owner |= dict.fromkeys(other, rank)
    if not found:  # a part of the model that text never reaches: its experts see no tokens
        cols = layout_of(path, module).projections[0].cols
        found = {n: (0, cols, 1, walk.streamed.dtype, False) for n in range(len(walk.batches))}
    rows = [found[n][0] for n in sorted(found)]
    _, cols, slots, dtype, ordered = next(iter(found.values()))
    hidden = store.shared(world, (sum(rows), cols), dtype)
    index = store.shared(world, (sum(rows), slots), torch.int32)
    weight = store.shared(world, (sum(rows), slots), torch.float32)
    output = store.shared(world, (sum(rows), slots, width), dtype)
    token = store.shared(world, (sum(rows),), torch.int64) if ordered else None
    starts = [0, *accumulate(rows)]
    for n in sorted(seen):
        part = slice(starts[n], starts[n + 1])
        h, index[part], weight[part], own = seen.pop(n)
        if token is not None and own is not None:
            token[part] = own
        hidden[part] = h
        output[part] = 0
        store.release(h)
    if world.apart:
        parts = [t for t in (hidden, index, weight, token) if t is not None]
        spread_rows(world, parts, starts, owner)
        output.zero_()
    world.meet(f"routing of {path}")
    return Parked(hidden, index, weight, rows, output, token)


def spread_rows(
    world: World, tensors: Sequence[Tensor], starts: Sequence[int], owner: Mapping[int, int]
) -> None:
    """Sends every batch's rows from the process that ran it to those that do not share memory."""
    for n in sorted(owner):
        for tensor in tensors:
            world.spread(tensor[starts[n] : starts[n + 1]], owner[n])


@contextmanager
def _ordering(walk: Walk, path: str, module: nn.Module, order: list[Tensor]) -> Iterator[None]:
    """While the context is open, `order` ends with the tokens that the router of `module` ordered
    last, if it does."""
    kind = kind_of(module)
    if kind is None or kind.router is None:
        yield
        return
    where, tokens = kind.router
    router = walk.streamed.model.get_submodule(where(path))
    handle = router.register_forward_hook(lambda _, __, out: order.append(tokens(out).long()))
    try:
        yield
    finally:
        handle.remove()


def _seen(
    walk: Walk, block: BlockRef, path: str, module: nn.Module, store: ActivationStore
) -> dict[int, tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Hidden states, expert indices, routing weights and (see `Parked.token`) tokens of every batch
    of this process that comes to the experts."""
    seen: dict[int, tuple[Tensor, Tensor, Tensor, Tensor | None]] = {}
    order: list[Tensor] = []

    def forward(*args: Any, **kwargs: Any) -> None:
        call = route(module, *args, **kwargs)
        if not torch.isfinite(call.hidden).all():
            raise NonFiniteError(
                f"{path}: NaN or Inf among the activations that reach the experts; "
                "the source is damaged or the compute dtype overflows"
            )
        weights = (
            torch.ones(call.index.shape) if call.weights is None else call.weights.float().cpu()
        )
        index = call.index.to(torch.int32).cpu()
        token = order[-1] if order else call.token
        if token is not None:
            token = token.cpu() + BATCH * walk.batch
        seen[walk.batch] = (store.keep(call.hidden), index, weights, token)
        stop_forward()

    module.forward = forward
    try:
        with _ordering(walk, path, module, order):
            walk.run(block, keep=False)
    finally:
        del module.forward
    return seen


@contextmanager
def plugged(walk: Walk, module: nn.Module, parked: Parked) -> Iterator[None]:
    """While the context is open, the experts answer with the parked outputs (batches in the order
    of `walk`).
    """
    starts = [0, *accumulate(parked.rows)]

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        call: Routed = route(module, *args, **kwargs)
        n = walk.batch
        total = parked.output[starts[n] : starts[n + 1]].sum(1)
        return total.to(call.hidden.device).reshape(*call.shape, -1)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@contextmanager
def answering(module: nn.Module, answer: Tensor) -> Iterator[None]:
    """While the context is open, the experts answer with rows that are given."""

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        call: Routed = route(module, *args, **kwargs)
        return answer.to(call.hidden.device, call.hidden.dtype).reshape(*call.shape, -1)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _find(keys: Tensor, among: Tensor) -> Tensor:
    """The place of every key among others, -1 where it is not."""
    if not len(among):
        return torch.full_like(keys, -1)
    order = torch.argsort(among, stable=True)
    at = torch.searchsorted(among[order], keys).clamp(max=len(among) - 1)
    return torch.where(among[order][at] == keys, order[at], -1)


def second_moment(x: Tensor, y: Tensor | None = None, device: torch.device | None = None) -> Tensor:
    """X^T Y (X^T X without `y`) as float64 [cols, cols], summed over fixed chunks of rows in order.

    The chunk size never depends on memory, threads or processes, so the result is the same
    everywhere.
    """
    y = x if y is None else y
    total = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=device or x.device)
    for a, b in zip(torch.split(x, _CHUNK), torch.split(y, _CHUNK), strict=True):
        a, b = a.to(total.device), b.to(total.device)
        total += (a.T @ b).double()
    return total
