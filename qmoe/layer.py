"""Quantize the experts of one layer: statistics of two streams, solver, outputs of the
quantized experts.

The quantized stream carries the inputs that the experts will see in the compressed model; the
original stream (only for methods with drift correction) carries those of the source. Groups of
experts are a function of their shape alone, so bytes do not depend on memory, threads or processes.

Memory: the matrices, Hessians and codes of one group, one chunk of rows, and what the
`ActivationStore` holds.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qmoe.calib.experts import Parked, second_moment
from qmoe.errors import NonFiniteError
from qmoe.families.base import ExpertsLayout, Projection
from qmoe.families.layouts import expert_forward
from qmoe.host import Host
from qmoe.quantize import Method, Problem, Solution
from qmoe.types import QuantizedMatrix

ROWS = 4096  # rows of activations at once; fixed, since it decides the rounding of sums
_GROUP_CELLS = 2**27  # Hessian cells of a group: 1 GiB in float64
_GROUP_EXPERTS = 32


@dataclass(frozen=True)
class Stream:
    """Tokens of one stream at the experts, and which of them may be learned from.

    Attributes:
        parked: see `qmoe.calib.experts.Parked`.
        keep: bool [N], False for special and padding tokens: they pass through, but no statistics
            are taken from them.
    """

    parked: Parked
    keep: Tensor


# receives (projection name, experts, their matrices): a group to be encoded with shared tables
Sink = Callable[[str, range, list[QuantizedMatrix]], None]


@dataclass(frozen=True)
class Coverage:
    """What calibration gave the experts of a module.

    Attributes:
        tokens: learnable tokens that each expert saw.
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
    host: Host,
    layout: ExpertsLayout,
    module: nn.Module,
    method: Method,
    quantized: Stream,
    original: Stream | None,
    device: torch.device,
    sink: Sink,
    progress: Callable[[int], object] = lambda experts: None,
) -> Coverage:
    """Quantizes every expert of a module, hands the integers on, and fills both streams' outputs.

    Args:
        host: where the experts' matrices are read from, each once.
        layout: of the module.
        module: the experts, its matrices on meta, everything else (biases, norms) resident.
        method: the solver.
        quantized: the stream whose inputs come from the quantized layers before this one.
        original: the source model's stream, needed if `method.drift` > 0.
        device: where solvers and Hessians run.
        sink: receives every group of every projection.
        progress: called with the number of experts done, after every group.

    Raises:
        NonFiniteError: NaN or Inf in weights, activations or Hessians; the text names the tensor.
    """
    work = _Work(host, layout, module, method, quantized, original, device)
    tokens: list[int] = []
    notes = [""] * layout.experts
    for group in groups(layout):
        seen: list[int] = []
        for projection, problem, solution in work.solve(group):
            seen = problem.tokens.tolist()
            sink(projection.name, group, solution.matrices)
            for e, note in zip(group, solution.notes, strict=True):
                if note and note not in notes[e]:
                    notes[e] = f"{notes[e]}; {note}" if notes[e] else note
        tokens += seen
        progress(len(group))
    return Coverage(tokens, notes)


class _Done(Exception):  # control flow: the activation is known, the rest is not needed
    pass


class _Work:
    """The state of one layer while its groups pass through."""

    def __init__(
        self,
        host: Host,
        layout: ExpertsLayout,
        module: nn.Module,
        method: Method,
        quantized: Stream,
        original: Stream | None,
        device: torch.device,
    ) -> None:
        self.host, self.layout, self.module, self.method = host, layout, module, method
        self.quantized, self.original, self.device = quantized, original, device
        self.layer = self._layer_moment()

    def _layer_moment(self) -> tuple[Tensor, int]:
        """Hessian of all tokens together (each slot counted) and the number of (token, slot) pairs
        behind it.
        """
        p, keep = self.quantized.parked, self.quantized.keep
        used = (p.index < self.layout.experts) & keep[:, None]
        mass = (used * (p.weight.square() if self.method.weighted else 1.0)).sum(1).sqrt()
        total = torch.zeros(
            p.hidden.shape[1], p.hidden.shape[1], dtype=torch.float64, device=self.device
        )
        for x, m in zip(p.hidden.split(ROWS), mass.split(ROWS), strict=True):
            total += second_moment(x.to(self.device).float() * m[:, None].to(self.device))
        return total, int(used.sum())

    def solve(self, group: range) -> Iterator[tuple[Projection, Problem, Solution]]:
        """Yields every projection of a group, solved; then its outputs are in the streams."""
        weights = [
            {k: w.float().to(self.device) for k, w in read.items()}
            for read in (self.host.read_expert(self.layout, self.module, e) for e in group)
        ]
        decoded: list[dict[str, Tensor]] = [{} for _ in group]
        for projection in self.layout.projections:
            problem = self._problem(group, projection, weights, decoded)
            solution = self.method.solve(problem)
            for d, m in zip(decoded, solution.matrices, strict=True):
                d[projection.name] = m.dequantize().to(self.device)
            yield projection, problem, solution
        for e, w, d in zip(group, weights, decoded, strict=True):
            self._outputs(self.quantized, e, d)
            if self.original is not None:
                self._outputs(self.original, e, w)

    def _problem(
        self,
        group: range,
        projection: Projection,
        weights: list[dict[str, Tensor]],
        decoded: list[dict[str, Tensor]],
    ) -> Problem:
        drift = self.original is not None
        hessians, crosses, tokens = [], [], []
        for e, w, d in zip(group, weights, decoded, strict=True):
            shape = (projection.cols, projection.cols)
            hessian = torch.zeros(shape, dtype=torch.float64, device=self.device)
            cross = torch.zeros_like(hessian) if drift else None
            token, slot = self.quantized.parked.slots(e)
            used = self.quantized.keep[token]
            token, slot = token[used], slot[used]
            for t, s in zip(token.split(ROWS), slot.split(ROWS), strict=True):
                x = self._inputs(self.quantized, e, t, s, projection, d)
                hessian += second_moment(x)
                if cross is not None and self.original is not None:
                    cross += second_moment(self._inputs(self.original, e, t, s, projection, w), x)
            hessians.append(hessian)
            tokens.append(len(token))
            if cross is not None:
                crosses.append(cross)
        stacked = torch.stack(hessians)
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
            cross=torch.stack(crosses) if drift else None,
        )

    def _inputs(
        self,
        stream: Stream,
        e: int,
        token: Tensor,
        slot: Tensor,
        projection: Projection,
        matrices: dict[str, Tensor],
    ) -> Tensor:
        """Rows [n, cols] that a projection sees, times the quantized stream's routing weight if the
        method wants that.
        """
        x = stream.parked.hidden[token].to(self.device).float()
        if projection.inner:
            x = self._activation(e, x, matrices)
        if self.method.weighted:
            x = x * self.quantized.parked.weight[token, slot, None].to(self.device)
        return x

    def _activation(self, e: int, x: Tensor, matrices: dict[str, Tensor]) -> Tensor:
        caught: list[Tensor] = []

        def record(h: Tensor) -> None:
            caught.append(h)
            raise _Done

        with suppress(_Done):
            expert_forward(self.module, matrices, e, x, record)
        return caught[0]

    def _outputs(self, stream: Stream, e: int, matrices: dict[str, Tensor]) -> None:
        p = stream.parked
        token, slot = p.slots(e)
        for t, s in zip(token.split(ROWS), slot.split(ROWS), strict=True):
            y = expert_forward(self.module, matrices, e, p.hidden[t].to(self.device).float())
            p.output[t, s] = (y.cpu() * p.weight[t, s, None]).to(p.output.dtype)
