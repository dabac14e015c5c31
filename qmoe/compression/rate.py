"""From a target in stored bits per weight to the global step of rd, and staying on the target.

A probe walks the source model once with a share of the calibration tokens, solves a sample of the
experts of every layer at a few steps and stores them, which gives each layer's bits as a function
of the one global step. The step that meets the target is read off; while the real run goes on, it
is corrected by what the finished layers really took, so that the total lands on the target.

One step for all layers is one slope of distortion against rate: no layer pays more per bit than
another.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from qmoe.codec import encode_group
from qmoe.compression.layer import groups
from qmoe.errors import QmoeError
from qmoe.quantize import Method, Problem, Solution, get_method
from qmoe.system.processes import World
from qmoe.types import ExpertsLayout, QuantizedMatrix

# Experts of a layer that are probed, at evenly spaced ranks of their token counts: as many as have
# this many weights, within bounds. Experts differ: 8 of 32 miss the bits of a layer by up to 11 %.
SAMPLE_WEIGHTS, SAMPLE_EXPERTS = 2**23, (8, 32)
REHEARSE = 0.05  # share of the weights from which on the last module is tried before it is made
REHEARSAL_TOLERANCE = 0.003  # of the target: a rehearsal that comes so near needs no other
TOLERANCE = 0.01  # of the target: what --bits promises
STEPS = (0.5, 0.75, 1.0, 1.4, 2.0)  # probed, times the step that meets the target in layer one
BRACKET = 9  # times that the first matrices are solved to find the step that meets the target
MAX_WALKS = 4  # of the probe at most, each around the step that the ones before it found
PROBE_SHARE, PROBE_MIN_TOKENS = 4, 16384  # the probe sees 1 / share of the tokens, or this many
MIN_BITS, MAX_BITS = 0.25, 5.0  # bits per weight that a target may have
_OFFSETS_BITS = 4 * 64  # stored for each matrix beside its group: see docs/format.md


@dataclass(frozen=True)
class Curve:
    """Predicted bits of one experts module.

    Attributes:
        path: of the module.
        weights: in it.
        deltas: global steps, ascending.
        bits: stored bits of the module at these steps, descending.
    """

    path: str
    weights: int
    deltas: tuple[float, ...]
    bits: tuple[float, ...]

    def at(self, delta: float) -> float:
        """Bits of the module at a step; log bits are linear in log delta between the points and
        go on with the slope of the last two beyond them.
        """
        x, y = np.log(self.deltas), np.log(self.bits)
        at = math.log(delta)
        i = int(np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2))
        slope = (y[i + 1] - y[i]) / (x[i + 1] - x[i])
        return float(np.exp(y[i] + slope * (at - x[i])))

    def merged(self, other: "Curve") -> "Curve":
        """The points of two curves of one module."""
        points = dict(zip(self.deltas, self.bits, strict=True))
        points |= dict(zip(other.deltas, other.bits, strict=True))
        deltas = tuple(sorted(points))
        return Curve(self.path, self.weights, deltas, tuple(points[d] for d in deltas))

    def as_list(self) -> list[Any]:
        """JSON values; the inverse is ``Curve(*values)``."""
        return [self.path, self.weights, list(self.deltas), list(self.bits)]


@dataclass
class Controller:
    """Picks the step of each layer so that the sum of all meets the target.

    Attributes:
        target: stored bits per expert weight.
        curves: of all modules, in the order of the run.
        solver_options: of rd, beside the step.
        spent: {module: (bits that it took, bits predicted at its step)} of the finished ones.
    """

    target: float
    curves: Sequence[Curve]
    solver_options: Mapping[str, float] = field(default_factory=dict)
    spent: dict[str, tuple[float, float]] = field(default_factory=dict)

    def delta(self) -> float:
        """The step for the layers that remain.

        Their predictions are scaled by how the finished layers compared with theirs. Where the
        budget is all but spent the step is bounded, so that no layer is starved for the others.
        """
        left = [c for c in self.curves if c.path not in self.spent]
        budget = self.target * sum(c.weights for c in self.curves)
        budget -= sum(took for took, _ in self.spent.values())
        ratio = 1.0
        if self.spent:
            took, said = (sum(v) for v in zip(*self.spent.values(), strict=True))
            ratio = took / said
        return self._solve(left, budget / ratio)

    def _solve(self, curves: Sequence[Curve], budget: float) -> float:
        low = min(c.deltas[0] for c in curves) / 16
        high = max(c.deltas[-1] for c in curves) * 16
        for _ in range(60):
            middle = math.sqrt(low * high)
            if sum(c.at(middle) for c in curves) > budget:
                low = middle
            else:
                high = middle
        return math.sqrt(low * high)

    def method(self, delta: float) -> Method:
        """rd with a step."""
        return get_method("rd", delta=delta, **self.solver_options)

    def ends_with(self, path: str) -> bool:
        """Whether a module is the only one left, and so large that its miss would show."""
        left = [c for c in self.curves if c.path not in self.spent]
        weights = sum(c.weights for c in self.curves)
        return [c.path for c in left] == [path] and left[0].weights > REHEARSE * weights

    def after(self, path: str, tries: Mapping[float, float]) -> float | None:
        """A better step for the last module, or None if the last one tried is good.

        Args:
            path: of the module.
            tries: stored bits of the whole module at the steps at which it was tried, in order.
        """
        total = self.target * sum(c.weights for c in self.curves)
        budget = total - sum(spent for spent, _ in self.spent.values())
        delta, took = list(tries.items())[-1]
        if abs(took - budget) <= REHEARSAL_TOLERANCE * total:
            return None
        curve = next(c for c in self.curves if c.path == path)
        if len(tries) == 1:
            return self._solve([curve], budget * curve.at(delta) / took)
        deltas = tuple(sorted(tries))
        measured = Curve(path, curve.weights, deltas, tuple(tries[d] for d in deltas))
        return self._solve([measured], budget)

    def record(self, path: str, took: float, delta: float) -> None:
        """A module is finished: `took` stored bits at the step `delta`."""
        curve = next(c for c in self.curves if c.path == path)
        self.spent[path] = (took, curve.at(delta))


def check_target(bits: float) -> None:
    """Raises QmoeError for a target outside of what the coder is made for."""
    if not MIN_BITS <= bits <= MAX_BITS:
        raise QmoeError(
            f"--bits {bits:g}: choose between {MIN_BITS:g} and {MAX_BITS:g} bits per weight"
        )


def missed(target: float, bits: float) -> str:
    """What to say of a result that is further than TOLERANCE from its target; else nothing."""
    off = bits / target - 1
    if abs(off) <= TOLERANCE:
        return ""
    why = "; matrices of few weights cannot fall below their side data" if off > 0 else ""
    return f"--bits {target:g} is missed by {100 * off:+.1f} %: experts take {bits:.4g}{why}"


def share(batches: int, tokens: int) -> int:
    """How many of the batches the probe sees, each of so many tokens."""
    return min(batches, max(math.ceil(batches / PROBE_SHARE), math.ceil(PROBE_MIN_TOKENS / tokens)))


def share_of(batches: Sequence[dict[str, Tensor]], tokens: int) -> list[dict[str, Tensor]]:
    """The batches that the probe sees, evenly spaced over the calibration set.

    Args:
        batches: all of them.
        tokens: in one batch.
    """
    count = share(len(batches), tokens)
    return [batches[i * len(batches) // count] for i in range(count)]


class Probe:
    """A `Method` that leaves the weights as they are and notes what they would take.

    Hessians are sums over tokens, so that U_jj of the probe's is larger than the full run's by the
    root of the ratio of tokens; the steps are scaled accordingly.
    """

    def __init__(
        self,
        target: float,
        tokens_ratio: float,
        layouts: Sequence[ExpertsLayout],
        solver_options: Mapping[str, float],
        centre: float | None = None,
        world: World | None = None,
    ) -> None:
        """Args: target in bits per weight; tokens of the run / tokens of the probe; the modules
        that will be walked through, in order; options of rd; the step around which bits are wanted,
        None for the one that meets the target in the first projection; the processes that make
        the same walk and divide the solving.
        """
        self._solver_options = {**solver_options, "drift": 0.0}
        self._target, self._scale = target, tokens_ratio**-0.5
        self._centre = centre
        self._world = world or World()
        self._costs: dict[tuple[int, int], float] = {}  # bits by call and step, this process's own
        self._weights = 0
        self._samples = [n for layout in layouts for n in samples(layout)]
        self._calls = 0
        self.curves: list[Curve] = []
        weighted = get_method("rd", **self._solver_options).weighted
        self.method = Method("probe", weighted=weighted, drift=0.0, solve=self._solve)

    def _solve(self, problem: Problem) -> Solution:
        unchanged = cast(list[QuantizedMatrix], [_Unchanged(w) for w in problem.weight])
        solution = Solution(unchanged, [""] * len(unchanged))
        sample = _spread(problem.tokens, self._samples[self._calls])
        self._calls += 1
        if len(sample) == 0:
            return solution
        part = Problem(
            weight=problem.weight[sample],
            hessian=problem.hessian[sample],
            tokens=problem.tokens[sample],
            layer_hessian=problem.layer_hessian,
            layer_tokens=problem.layer_tokens,
            importance=problem.importance,
        )
        if self._centre is None:
            self._centre = self._world.share(
                lambda: self._bracket(part, len(problem.weight)), "step of the probe"
            )
        for i in range(len(STEPS)):
            if (self._calls * len(STEPS) + i) % self._world.size == self._world.rank:
                cost = self._cost(part, self._centre * STEPS[i], len(problem.weight))
                self._costs[self._calls, i] = cost * problem.weight.numel()
        self._weights += problem.weight.numel()
        return solution

    def _cost(self, part: Problem, delta: float, group: int) -> float:
        """Stored bits per weight of a sample that stands for a group of `group` experts."""
        method = get_method("rd", delta=delta * self._scale, **self._solver_options)
        encoded = encode_group(method.solve(part).matrices)
        header = 8.0 * encoded.tables.numel()
        blobs = encoded.stored_bits - header
        share = len(part.weight) / group
        cells = part.weight.numel()
        return (blobs + header * share + _OFFSETS_BITS * len(part.weight)) / cells

    def _bracket(self, part: Problem, group: int) -> float:
        """The step at which the first projection of the first layer meets the target."""
        low = high = 8.0
        while self._cost(part, low, group) < self._target and low > 1e-6:
            low /= 2
        while self._cost(part, high, group) > self._target and high < 1e6:
            high *= 2
        for _ in range(4):
            middle = math.sqrt(low * high)
            if self._cost(part, middle, group) > self._target:
                low = middle
            else:
                high = middle
        return math.sqrt(low * high)

    def finish(self, layout: ExpertsLayout) -> None:
        """Closes a module: its curve is complete."""
        if self._centre is None:
            raise ValueError(f"{layout.path}: nothing was solved")
        costs: dict[tuple[int, int], float] = {}
        for found in self._world.collect(self._costs, f"probe of {layout.path}"):
            costs |= found
        sums = [0.0] * len(STEPS)
        for (_, i), bits in sorted(costs.items()):  # an order that no process decides
            sums[i] += bits
        scale = layout.weights / self._weights
        deltas = tuple(self._centre * step for step in STEPS)
        self.curves.append(
            Curve(layout.path, layout.weights, deltas, tuple(bits * scale for bits in sums))
        )
        self._costs, self._weights = {}, 0


def samples(layout: ExpertsLayout) -> list[int]:
    """How many experts are probed in every call of the solver for a module: groups in order, each
    projection of a group in turn.
    """
    sizes = [len(group) for group in groups(layout)]
    low, high = SAMPLE_EXPERTS
    room = SAMPLE_WEIGHTS * layout.experts // layout.weights
    wanted = min(layout.experts, high, max(low, room))
    out = []
    for i, size in enumerate(sizes):
        count = (i + 1) * wanted // len(sizes) - i * wanted // len(sizes)
        out += [min(count, size)] * len(layout.projections)
    return out


def _spread(tokens: Tensor, count: int) -> Tensor:
    """Indices of `count` experts at evenly spaced ranks of their token counts."""
    order = torch.argsort(tokens.cpu(), stable=True)
    at = [(2 * i + 1) * len(order) // (2 * count) for i in range(count)]
    return order[at].sort().values


@dataclass(frozen=True)
class _Unchanged:
    """Stands where a quantized matrix would: the weight itself."""

    weight: Tensor

    def dequantize(self) -> Tensor:
        return self.weight


def module_bits(layout: ExpertsLayout, report: dict[str, Any]) -> float:
    """Stored bits of a finished module, offsets included, from its entry in the report."""
    stream: float = sum(8.0 * p["bytes"] for p in report["projections"].values())
    return stream + offsets_bits(layout)


def offsets_bits(layout: ExpertsLayout) -> float:
    """Bits of a module that are stored beside its streams."""
    return float(_OFFSETS_BITS * layout.experts * len(layout.projections))
