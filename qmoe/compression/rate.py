"""From a target in stored bits per weight to the global step of rd, and staying on the target.

`qmoe.compression.probe` finds each layer's bits as a function of the one global step. The step that
meets the target is read off; while the real run goes on, it is corrected by what the finished
layers really took, so that the total lands on the target.

One step for all layers is one slope of distortion against rate: no layer pays more per bit than
another.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qmoe.errors import QmoeError
from qmoe.quantize import Method, get_method
from qmoe.types import ExpertsLayout

REHEARSE = 0.05  # share of the weights from which on the last module is tried before it is made
REHEARSAL_TOLERANCE = 0.003  # of the target: a rehearsal that comes so near needs no other
TOLERANCE = 0.01  # of the target: what --bits promises
MIN_BITS, MAX_BITS = 0.25, 5.0  # bits per weight that a target may have
OFFSETS_BITS = 4 * 64  # stored for each matrix beside its group: see docs/format.md


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


def missed(target: float, bits: float, option: str = "--bits") -> str:
    """What to say of a result that is further than TOLERANCE from its target; else nothing."""
    off = bits / target - 1
    if abs(off) <= TOLERANCE:
        return ""
    why = "; matrices of few weights cannot fall below their side data" if off > 0 else ""
    what = "experts take" if option == "--bits" else "the file takes"
    return f"{option} {target:g} is missed by {100 * off:+.1f} %: {what} {bits:.4g}{why}"


def module_bits(layout: ExpertsLayout, report: dict[str, Any]) -> float:
    """Stored bits of a finished module, offsets included, from its entry in the report."""
    stream: float = sum(8.0 * p["bytes"] for p in report["projections"].values())
    return stream + offsets_bits(layout)


def offsets_bits(layout: ExpertsLayout) -> float:
    """Bits of a module that are stored beside its streams."""
    return float(OFFSETS_BITS * layout.experts * len(layout.projections))
