"""Quantize the experts of one layer: statistics of two streams, solver, encoder, outputs of the
quantized experts.

The quantized stream carries the inputs that the experts will see in the compressed model; the
original stream (only for methods with drift correction) carries those of the source. Groups of
experts are a function of their shape alone, so bytes do not depend on memory, threads or processes.

Memory: the matrices, Hessians and codes of one group, one chunk of rows, and what the
`ActivationStore` holds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qmoe.calib.experts import Parked, second_moment
from qmoe.codec import EncodedGroup, encode_group, ideal_bits
from qmoe.errors import NonFiniteError
from qmoe.families.base import ExpertsLayout, Projection
from qmoe.families.layouts import expert_forward
from qmoe.host import Host
from qmoe.quantize import Method, Problem
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


@dataclass
class ProjectionReport:
    """What was done to one projection of one layer, summed over experts; `inspect --layers` prints
    it.
    """

    module: str
    projection: str
    rows: int
    cols: int
    weights: int = 0
    zeros: int = 0
    bits: float = 0.0
    ideal_bits: float = 0.0
    tokens: list[int] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EncodedLayer:
    """An experts module as it is stored: see docs/format.md.

    Attributes:
        stream: uint8 [bytes], group headers and matrices.
        offsets: int64 [E, projections, 4]: start and end of the group header, start and end of the
            matrix.
        reports: one per projection.
    """

    stream: Tensor
    offsets: Tensor
    reports: list[ProjectionReport]


def groups(layout: ExpertsLayout) -> Iterator[range]:
    """Ranges of experts that are solved together and share tables; depends on the layout alone."""
    widest = max(p.cols for p in layout.projections)
    size = max(1, min(_GROUP_EXPERTS, layout.experts, _GROUP_CELLS // widest**2))
    for start in range(0, layout.experts, size):
        yield range(start, min(start + size, layout.experts))


def quantize_layer(
    host: Host,
    layout: ExpertsLayout,
    module: nn.Module,
    method: Method,
    quantized: Stream,
    original: Stream | None,
    device: torch.device,
    progress: Callable[[int], None] = lambda experts: None,
) -> EncodedLayer:
    """Quantizes and encodes every expert of a module and fills both streams' outputs.

    Args:
        host: where the experts' matrices are read from, each once.
        layout: of the module.
        module: the experts, its matrices on meta, everything else (biases, norms) resident.
        method: the solver.
        quantized: the stream whose inputs come from the quantized layers before this one.
        original: the source model's stream, needed if `method.drift` > 0.
        device: where solvers and Hessians run.
        progress: called with the number of experts done, after every group.

    Raises:
        NonFiniteError: NaN or Inf in weights, activations or Hessians; the text names the tensor.
    """
    work = _Work(host, layout, module, method, quantized, original, device)
    blobs: list[Tensor] = []
    at = 0
    offsets = torch.zeros(layout.experts, len(layout.projections), 4, dtype=torch.int64)
    reports = [ProjectionReport(layout.path, p.name, p.rows, p.cols) for p in layout.projections]
    for group in groups(layout):
        for j, (projection, matrices, tokens, notes) in enumerate(work.solve(group)):
            encoded = encode_group(matrices)
            head = (at, at + encoded.tables.numel())
            blobs.append(encoded.tables)
            at = head[1]
            for e, blob in zip(group, encoded.matrices, strict=True):
                offsets[e, j] = torch.tensor([*head, at, at + blob.numel()])
                blobs.append(blob)
                at += blob.numel()
            _add(reports[j], projection, matrices, encoded, tokens, notes, group)
        progress(len(group))
    return EncodedLayer(torch.cat(blobs), offsets, reports)


def _add(
    report: ProjectionReport,
    projection: Projection,
    matrices: list[QuantizedMatrix],
    encoded: EncodedGroup,
    tokens: list[int],
    notes: list[str],
    group: range,
) -> None:
    report.weights += len(matrices) * projection.rows * projection.cols
    report.zeros += sum(int((m.codes == 0).sum()) for m in matrices)
    report.bits += 8.0 * (encoded.tables.numel() + sum(b.numel() for b in encoded.matrices))
    report.ideal_bits += ideal_bits(matrices)
    report.tokens += tokens
    report.notes |= {str(e): n for e, n in zip(group, notes, strict=True) if n}


class _Done(Exception):  # noqa: N818 - control flow: the activation is known, the rest of the expert is not needed
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

    def solve(
        self, group: range
    ) -> Iterator[tuple[Projection, list[QuantizedMatrix], list[int], list[str]]]:
        """Yields every projection of a group, solved; afterwards the group's outputs are in the
        streams.
        """
        weights = [
            {
                k: w.float().to(self.device)
                for k, w in self.host.read_expert(self.layout, self.module, e).items()
            }
            for e in group
        ]
        decoded: list[dict[str, Tensor]] = [{} for _ in group]
        for projection in self.layout.projections:
            problem = self._problem(group, projection, weights, decoded)
            solution = self.method.solve(problem)
            for d, m in zip(decoded, solution.matrices, strict=True):
                d[projection.name] = m.dequantize()
            yield projection, solution.matrices, problem.tokens.tolist(), solution.notes
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

        try:
            expert_forward(self.module, matrices, e, x, record)
        except _Done:
            pass
        return caught[0]

    def _outputs(self, stream: Stream, e: int, matrices: dict[str, Tensor]) -> None:
        p = stream.parked
        token, slot = p.slots(e)
        for t, s in zip(token.split(ROWS), slot.split(ROWS), strict=True):
            y = expert_forward(self.module, matrices, e, p.hidden[t].to(self.device).float())
            p.output[t, s] = (y.cpu() * p.weight[t, s, None]).to(p.output.dtype)
