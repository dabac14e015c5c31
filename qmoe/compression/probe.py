"""A walk through the source that learns each layer's bits as a function of the global step.

It goes past every block with a share of the calibration tokens, leaves the weights as they are, and
solves and encodes a sample of the experts of every layer at a few steps. What is done with the
curves is in `qmoe.compression.rate`. Of several processes each walks by itself and solves its share
of the samples; they exchange numbers only.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from qmoe.calib.outputs import Resident
from qmoe.compression.blocks import BlockLoop
from qmoe.compression.coding import trial_bits
from qmoe.compression.job import Job
from qmoe.compression.layer import groups
from qmoe.compression.rate import OFFSETS_BITS, Controller, Curve
from qmoe.models.downloads import begin_walk, leave
from qmoe.quantize import Method, Problem, Solution, get_method, rd
from qmoe.system.processes import World
from qmoe.types import ExpertsLayout, QuantizedMatrix

# Experts of a layer that are probed, at evenly spaced ranks of their token counts: as many as have
# this many weights, within bounds. Experts differ: 8 of 32 miss the bits of a layer by up to 11 %.
SAMPLE_WEIGHTS, SAMPLE_EXPERTS = 2**23, (8, 32)
STEPS = (0.5, 0.75, 1.0, 1.4, 2.0)  # probed, times the step that meets the target in layer one
BRACKET = 9  # times that the first matrices are solved to find the step that meets the target
MAX_WALKS = 4  # of the probe at most, each around the step that the ones before it found
PROBE_SHARE, PROBE_MIN_TOKENS = 4, 16384  # it sees 1 / PROBE_SHARE of the tokens, at least so many


def probed(job: Job, target: float) -> list[list[Any]]:
    """Curves of all modules that enclose the target.

    Args:
        job: the run; its model with everything outside its blocks resident. All processes call this
            in step.
        target: stored bits per expert weight.

    Returns:
        `Curve.as_list` of every module, in order; the same bytes for every number of processes.
    """
    some = share_of(job.batches, job.batches[0]["input_ids"].numel())
    part = replace(job, batches=some, own=0, world=World())
    ratio = job.tokens() / part.tokens()
    blocks = list(job.streamed.blocks())
    layouts = [layout for block in blocks for layout, _ in job.streamed.experts_of(block)]
    options = job.settings.solver_options
    curves: list[Curve] = []
    delta: float | None = None
    for _ in range(MAX_WALKS):
        probe = Probe(target, ratio, layouts, options, delta, job.world)
        outputs = Resident(job.store)
        loop = BlockLoop(replace(part, method=probe.method), [outputs])
        begin_walk(job.streamed, blocks, job.world)
        hidden = not job.progress
        for i, block in enumerate(tqdm(blocks, desc="probe", unit="block", disable=hidden)):
            loop.block(block, None, blocks[i + 1 : i + 2], probe.finish)
            job.world.meet(f"probe of {block.name}")
            leave(job.streamed, block)
        outputs.drop()
        pairs = zip(curves or probe.curves, probe.curves, strict=True)
        curves = [known.merged(found) for known, found in pairs]
        delta = Controller(target, curves).delta()
        if curves[0].deltas[0] <= delta <= curves[0].deltas[-1]:
            break  # between measured points: nothing was guessed
    return [c.as_list() for c in curves]


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


class Probe:
    """A `Method` that leaves the weights as they are and notes what they would take.

    Hessians are sums over tokens, so that U_jj of the probe's is larger than the full run's by the
    root of the ratio of tokens; the steps are scaled accordingly, and so is what experts borrow.
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
        shrinkage = solver_options.get("shrinkage", rd.Options.shrinkage) / tokens_ratio
        self._solver_options = {**solver_options, "drift": 0.0, "shrinkage": shrinkage}
        self._target, self._scale = target, tokens_ratio**-0.5
        self._centre = centre
        self._world = world or World()
        self._costs: dict[tuple[int, int], float] = {}  # bits by call and step, this process's own
        self._weights = 0
        self._samples = [n for layout in layouts for n in samples(layout)]
        self._calls = 0
        self.curves: list[Curve] = []
        plain = get_method("rd", **self._solver_options)
        self.method = Method("probe", plain.weighted, 0.0, self._solve, plain.least_use)

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
        )
        solved = cache(partial(rd.at_any_step, part, **self._solver_options))

        def cost(delta: float) -> float:
            matrices = solved()(delta * self._scale).matrices
            return self._cost(matrices, part.weight.numel(), len(problem.weight))

        if self._centre is None:
            self._centre = self._world.share(lambda: self._bracket(cost), "step of the probe")
        for i in range(len(STEPS)):
            if (self._calls * len(STEPS) + i) % self._world.size == self._world.rank:
                self._costs[self._calls, i] = cost(self._centre * STEPS[i]) * problem.weight.numel()
        self._weights += problem.weight.numel()
        return solution

    @staticmethod
    def _cost(matrices: Sequence[QuantizedMatrix], cells: int, group: int) -> float:
        """Stored bits per weight of a sample of so many weights that stands for a group of `group`
        experts."""
        header, blobs = trial_bits(matrices)
        share = len(matrices) / group
        return (blobs + header * share + OFFSETS_BITS * len(matrices)) / cells

    def _bracket(self, cost: Callable[[float], float]) -> float:
        """The step at which the first projection of the first layer meets the target."""
        low = high = 8.0
        while cost(low) < self._target and low > 1e-6:
            low /= 2
        while cost(high) > self._target and high < 1e6:
            high *= 2
        for _ in range(4):
            middle = math.sqrt(low * high)
            if cost(middle) > self._target:
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
