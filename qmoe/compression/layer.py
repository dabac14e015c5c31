"""Solves and encodes the experts of one layer from what its tokens bring, and computes what the
quantized experts answer.

The quantized stream carries the inputs that the experts will see in the compressed model; the
original stream (only for methods with drift correction) carries those of the source. Groups of
experts are a function of their shape alone, so bytes do not depend on memory, threads or processes.

Memory: the matrices, Hessians and codes of one group, one chunk of rows, and what the
`ActivationStore` holds.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from qmoe.calib.lost import share
from qmoe.calib.routing import Parked, second_moment
from qmoe.compression.coding import encode_experts
from qmoe.compression.job import Job
from qmoe.errors import NonFiniteError
from qmoe.models.families.find import expert_forward
from qmoe.quantize import Problem, Solution
from qmoe.store.block import EncodedBatch
from qmoe.system.processes import World
from qmoe.types import ExpertsLayout, ProjectionShape

ROWS = 4096  # rows of activations at once; fixed, since it decides the rounding of sums
_GROUP_CELLS = 2**24  # Hessian cells of a group: 128 MiB in float64, of which eight are alive
_GROUP_EXPERTS = 32
_ONLY_SPECIAL = "no ordinary tokens: special ones used"
_STRIPE = 512  # rows of the layer's Hessian that are computed as one piece of work


@dataclass(frozen=True)
class Calibrated:
    """Tokens of one stream at the experts, and which of them may be learned from.

    Attributes:
        parked: see `qmoe.calib.routing.Parked`.
        keep: bool [N], False for special and padding tokens: they pass through, but statistics are
            taken from them only for experts that see nothing else (in encoder-decoder models some
            serve sentinels alone, and losing those costs more than any rounding).
        text: bool [N], False for tokens that the model said by itself: it learns from them, but
            they are not counted as the text's.
        lost: [N, width], what the experts' answers are to make good besides, see `qmoe.calib.lost`;
            None for nothing.
    """

    parked: Parked
    keep: Tensor
    text: Tensor
    lost: Tensor | None = None


OnEncoded = Callable[[EncodedBatch], None]


@dataclass(frozen=True)
class Coverage:
    """What calibration gave the experts of a module.

    Attributes:
        tokens: of the text that each expert learnt from.
        notes: for each expert what was done about it, "" if nothing was unusual.
    """

    tokens: list[int]
    notes: list[str]


def groups(layout: ExpertsLayout) -> Iterator[range]:
    """Ranges of experts that are solved together and share tables; depends on the layout alone."""
    widest = max(p.cols for p in layout.projections)
    size = max(1, min(_GROUP_EXPERTS, layout.experts, _GROUP_CELLS // widest**2))
    for start in range(0, layout.experts, size):
        yield range(start, min(start + size, layout.experts))


@torch.no_grad()
def quantize_layer(
    job: Job,
    layout: ExpertsLayout,
    module: nn.Module,
    streams: Sequence[Calibrated],
    on_encoded: OnEncoded | None,
    title: str = "",
) -> Coverage:
    """Solves and encodes every expert of a module, and fills the outputs of all streams.

    Of several processes each takes its share of the groups; when all return, the outputs are
    complete. A group is computed by one process in one order, so the number of processes does not
    change a bit.

    Args:
        job: the solver, the model from which every matrix is read once, and the processes that
            share the groups.
        layout: of the module.
        module: the experts, its matrices on meta, everything else (biases, norms) resident.
        streams: the tokens whose inputs come from the quantized layers before this one and, if the
            method corrects drift, those of the source model.
        on_encoded: receives every group of every projection; None encodes nothing.
        title: of the bar, by default the module's path.

    Raises:
        NonFiniteError: NaN or Inf in weights, activations or Hessians; the text names the tensor.
    """
    world = job.world
    work = _Work(job, layout, module, streams)
    tokens: dict[int, int] = {}
    notes: dict[int, str] = {}
    todo = list(groups(layout))
    hidden = not job.progress
    with tqdm(
        total=layout.experts, desc=title or layout.path, unit="expert", leave=False, disable=hidden
    ) as bar:
        for i in world.mine(len(todo)):
            if i + world.size < len(todo):
                job.streamed.prefetch(layout, module, todo[i + world.size])
            for projection, seen, solution in work.solve(todo[i]):
                if on_encoded is not None:
                    name = projection.name
                    on_encoded(encode_experts(name, todo[i], solution.matrices))
                job.store.trim()
                tokens |= dict(zip(todo[i], seen, strict=True))
                work.note(todo[i], solution.notes, notes)
            bar.update(len(todo[i]) * world.size)
    for other_tokens, other_notes in world.collect((tokens, notes), f"experts of {layout.path}"):
        tokens |= other_tokens
        notes |= other_notes
    if world.apart:
        for i, group in enumerate(todo):
            for stream in streams:
                stream.parked.spread(world, group, i % world.size)
    experts = range(layout.experts)
    return Coverage([tokens[e] for e in experts], [notes[e] for e in experts])


@torch.no_grad()
def run_layer(
    job: Job, layout: ExpertsLayout, module: nn.Module, streams: Sequence[Calibrated]
) -> None:
    """Fills the outputs of all streams with those of the experts as they are.

    Args:
        job, layout, module, streams: see `quantize_layer`; one process does all of it.
    """
    todo = list(groups(layout))
    for i, group in enumerate(todo):
        if i + 1 < len(todo):
            job.streamed.prefetch(layout, module, todo[i + 1])
        for e in group:
            matrices = job.streamed.read_expert(layout, module, e)
            placed = {k: w.float().to(job.device) for k, w in matrices.items()}
            for stream in streams:
                _run_expert(module, stream.parked, e, placed, job.device)
        job.store.trim()


class _Done(Exception):  # control flow: the activation is known, the rest is not needed
    pass


class _Work:
    """The state of one layer while its groups pass through."""

    def __init__(
        self,
        job: Job,
        layout: ExpertsLayout,
        module: nn.Module,
        streams: Sequence[Calibrated],
    ) -> None:
        self.streamed, self.layout, self.module = job.streamed, layout, module
        self.method, self.device = job.method, job.device
        self.quantized = streams[0]
        self.original = streams[1] if len(streams) > 1 else None
        self.only_special: set[int] = set()  # experts that ordinary tokens never reached
        self.seen: dict[int, int] = {}  # tokens of the text that each expert learnt from
        self.lent: set[int] = set()  # experts that learn from tokens routed elsewhere, too
        self.partners: Tensor | None = None  # rows of the original stream, by row of the quantized
        if self.original is not None:
            self.partners = self.quantized.parked.partners(self.original.parked, layout.experts)
        self.layer = self._layer_moment(job.world)

    def note(self, group: range, found: Sequence[str], notes: dict[int, str]) -> None:
        """Adds what a solver said of the experts of a group to what is known of them."""
        for e, note in zip(group, found, strict=True):
            first = _ONLY_SPECIAL if e in self.only_special else ""
            if e in self.lent:
                share = f"seen by less than {self.method.least_use:g} of an equal share of tokens"
                first = "; ".join(filter(None, (first, f"{share}: the layer's others lent")))
            known = notes.setdefault(e, first)
            if note and note not in known:
                notes[e] = f"{known}; {note}" if known else note

    def _layer_moment(self, world: World) -> tuple[Tensor, int]:
        """Hessian of all tokens together (each slot counted) and the number of (token, slot) pairs
        behind it.
        """
        p, keep = self.quantized.parked, self.quantized.keep
        used = (p.index < self.layout.experts) & keep[:, None]
        self.ordinary = used.any(1).nonzero().flatten()
        share = self.method.least_use * int(used.sum()) / self.layout.experts
        self.least = min(math.ceil(share), len(self.ordinary))
        self.typical = p.weight[used].square().mean().sqrt() if self.least else torch.zeros(())
        mass = (used * (p.weight.square() if self.method.weighted else 1.0)).sum(1).sqrt()
        cols = p.hidden.shape[1]
        stripes = [slice(a, min(a + _STRIPE, cols)) for a in range(0, cols, _STRIPE)]
        mine = {
            i: torch.zeros(
                stripes[i].stop - stripes[i].start, cols, dtype=torch.float64, device=self.device
            )
            for i in world.mine(len(stripes))
        }
        for x, m in zip(torch.split(p.hidden, ROWS), torch.split(mass, ROWS), strict=True):
            x = x.to(self.device).float() * m[:, None].to(self.device)
            for i, part in mine.items():
                part += second_moment(x[:, stripes[i]], x)
        total = torch.empty(cols, cols, dtype=torch.float64, device=self.device)
        parts = {i: part.cpu() for i, part in mine.items()}
        for found in world.collect(parts, f"Hessian of {self.layout.path}"):
            for i, part in found.items():
                total[stripes[i]] = part
        return total, int(used.sum())

    def solve(self, group: range) -> Iterator[tuple[ProjectionShape, list[int], Solution]]:
        """Yields every projection of a group with the tokens that each expert saw, solved; then the
        group's outputs are in the streams.
        """
        weights = [
            {k: w.float().to(self.device) for k, w in read.items()}
            for read in (self.streamed.read_expert(self.layout, self.module, e) for e in group)
        ]
        decoded: list[dict[str, Tensor]] = [{} for _ in group]
        for projection in self.layout.projections:
            problem = self._problem(group, projection, weights, decoded)
            solution = self.method.solve(problem)
            for d, m in zip(decoded, solution.matrices, strict=True):
                d[projection.name] = m.dequantize().to(self.device)
            tokens = [self.seen[e] for e in group]
            del problem  # the next one's Hessians need its room
            yield projection, tokens, solution
        for e, w, d in zip(group, weights, decoded, strict=True):
            _run_expert(self.module, self.quantized.parked, e, d, self.device)
            if self.original is not None:
                _run_expert(self.module, self.original.parked, e, w, self.device)

    def _problem(
        self,
        group: range,
        projection: ProjectionShape,
        weights: list[dict[str, Tensor]],
        decoded: list[dict[str, Tensor]],
    ) -> Problem:
        drift = self.original is not None
        shape = (len(group), projection.cols, projection.cols)
        stacked = torch.zeros(shape, dtype=torch.float64, device=self.device)
        crosses = torch.zeros_like(stacked) if drift else None
        owed = None
        if self.quantized.lost is not None and projection is self.layout.projections[-1]:
            shape = (len(group), projection.rows, projection.cols)
            owed = torch.zeros(shape, dtype=torch.float64, device=self.device)
        tokens = []
        for i, (e, w, d) in enumerate(zip(group, weights, decoded, strict=True)):
            token, gate = self._learnt(e)
            tokens.append(len(token))
            for t, g in zip(torch.split(token, ROWS), torch.split(gate, ROWS), strict=True):
                x = self._inputs(self.quantized, e, t, g, projection, d)
                stacked[i] += second_moment(x)
                if crosses is not None:
                    crosses[i] += second_moment(self._before(e, t, g, projection, w, x), x)
                if owed is not None:
                    owed[i] += second_moment(self._owed(e, t, g), x)
        name = f"{self.layout.path} ({projection.name})"
        if not torch.isfinite(stacked).all():
            raise NonFiniteError(
                f"{name}: a Hessian overflowed; activations are too large for this compute dtype"
            )
        layer, layer_tokens = (stacked.sum(0), sum(tokens)) if projection.inner else self.layer
        return Problem(
            weight=torch.stack([w[projection.name] for w in weights]),
            hessian=stacked,
            tokens=torch.tensor(tokens),
            layer_hessian=layer,
            layer_tokens=layer_tokens,
            cross=crosses,
            owed=owed,
        )

    def _owed(self, e: int, token: Tensor, gate: Tensor) -> Tensor:
        """Rows [n, width] of an expert's share of what the answers are to make good."""
        assert self.quantized.lost is not None
        part = share(self.quantized.parked, self.layout.experts, e, token)
        part = part * gate if self.method.weighted else part
        return (self.quantized.lost[token].float() * part[:, None]).to(self.device)

    def _learnt(self, e: int) -> tuple[Tensor, Tensor]:
        """Tokens [n] that an expert learns from and their routing weights [n]: those routed to it
        and, where they are too few, evenly spaced ones of the layer as if they were.
        """
        p = self.quantized.parked
        token, slot = p.slots(e)
        used = self.quantized.keep[token]
        if used.any():
            token, slot = token[used], slot[used]
        elif len(token):
            self.only_special.add(e)
        self.seen[e] = int(self.quantized.text[token].sum())
        gate = p.weight[token, slot]
        lacking = self.least - len(token)
        if lacking <= 0:
            return token, gate
        self.lent.add(e)
        lent = self.ordinary[torch.arange(lacking) * len(self.ordinary) // lacking]
        return torch.cat([token, lent]), torch.cat([gate, self.typical.expand(lacking)])

    def _before(
        self,
        e: int,
        token: Tensor,
        gate: Tensor,
        projection: ProjectionShape,
        matrices: dict[str, Tensor],
        after: Tensor,
    ) -> Tensor:
        """What the projection sees in the original stream for the same tokens as `after` in the
        quantized one; where that has no such row, there is no drift to correct."""
        assert self.original is not None
        if self.partners is None:
            return self._inputs(self.original, e, token, gate, projection, matrices)
        partner = self.partners[token]
        x = self.original.parked.hidden[partner.clamp(min=0)].to(self.device).float()
        if projection.inner:
            x = self._activation(e, x, matrices)
        if self.method.weighted:
            x = x * gate[:, None].to(self.device)
        return torch.where((partner >= 0)[:, None].to(self.device), x, after)

    def _inputs(
        self,
        stream: Calibrated,
        e: int,
        token: Tensor,
        gate: Tensor,
        projection: ProjectionShape,
        matrices: dict[str, Tensor],
    ) -> Tensor:
        """Rows [n, cols] that a projection sees, times the quantized stream's routing weight if the
        method wants that.
        """
        x = stream.parked.hidden[token].to(self.device).float()
        if projection.inner:
            x = self._activation(e, x, matrices)
        if self.method.weighted:
            x = x * gate[:, None].to(self.device)
        return x

    def _activation(self, e: int, x: Tensor, matrices: dict[str, Tensor]) -> Tensor:
        caught: list[Tensor] = []

        def record(h: Tensor) -> None:
            caught.append(h)
            raise _Done

        with suppress(_Done):
            expert_forward(self.module, matrices, e, _padded(x), record)
        return caught[0][: len(x)]


def _run_expert(
    module: nn.Module, parked: Parked, e: int, matrices: dict[str, Tensor], device: torch.device
) -> None:
    """Fills the outputs of an expert's tokens."""
    token, slot = parked.slots(e)
    for t, s in zip(torch.split(token, ROWS), torch.split(slot, ROWS), strict=True):
        x = _padded(parked.hidden[t].to(device).float())
        y = expert_forward(module, matrices, e, x)[: len(t)]
        parked.output[t, s] = (y.cpu() * parked.weight[t, s, None]).to(parked.output.dtype)


def _padded(x: Tensor) -> Tensor:
    """Few rows with zeros below, up to a multiple of four: products with 5 to 7 or 9 to 11 rows (17
    to 27 with 16 threads) are summed in another order by MKL when it has another number of
    threads. With such padding none was seen that is.
    """
    return F.pad(x, (0, 0, 0, -len(x) % 4)) if len(x) < 32 else x
