"""How long a compression will take on this machine.

Its arithmetic (docs/scale.md) at speeds that are measured on one small matrix with the run's own
solver and coder.

Knows nothing about memory or disks' room.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qmoe.calib.own_words import LENGTH
from qmoe.compression import probe
from qmoe.compression.coding import encode_experts
from qmoe.compression.layer import groups
from qmoe.compression.rate import REHEARSE
from qmoe.quantize import Method, Problem
from qmoe.types import ExpertsLayout, ProjectionShape

START = 8.0  # seconds: libraries, compiled loops, the empty model
_DISK = 200e6  # bytes per second, a slow disk
_LARGEST = (1024, 1024)  # rows and cols of the matrix on which speeds are measured
_FACTOR, _FEEDBACK = 5.0, 8.0  # operations per cols^3 and per rows * cols^2
_LIGHT = 1.3  # a forward also has norms, softmax and routing, which are slower than products
_REHEARSED = 1.5  # times that a last module is solved before it is made
_DENSE_STEPS = 4  # times that a sample of a dense matrix is coded before all of it is


@dataclass(frozen=True)
class Work:
    """What a run has to do.

    Attributes:
        layouts: of all experts modules.
        tokens: calibration tokens, of all batches together.
        batch: tokens of one batch.
        context: tokens of a window.
        blocks: of the model.
        slots: experts of a token.
        streams: 2 with drift correction.
        dense: parameters inside the blocks that are no experts'.
        outside: parameters outside the blocks.
        source: bytes to be read.
        probed: a number of bits is aimed at.
        coded: (rows, cols) of the dense matrices that are coded.
        own: of the tokens, those that the model says itself.
    """

    layouts: Sequence[ExpertsLayout]
    tokens: int
    batch: int
    context: int
    blocks: int
    slots: int
    streams: int
    dense: float
    outside: float
    source: int
    probed: bool
    coded: Sequence[tuple[int, int]]
    own: int = 0


@dataclass(frozen=True)
class Speeds:
    """What this machine does in a second.

    Attributes:
        product: floating point operations of a float32 product.
        solver: operations of a solver, see docs/scale.md.
        coder: weights.
    """

    product: float
    solver: float
    coder: float

    @classmethod
    def measured(
        cls, method: Method, layouts: Sequence[ExpertsLayout], device: torch.device
    ) -> "Speeds":
        """Of this machine, now; takes about a second, and the loops that it compiles or loads are
        needed anyway.
        """
        p = max((p for la in layouts for p in la.projections), key=lambda p: p.cols)
        rows, cols = min(p.rows, _LARGEST[0]), min(p.cols, _LARGEST[1])
        count = max(1, 2**18 // (rows * cols))
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2 * cols, cols, generator=generator)
        weight = torch.randn(count, rows, cols, generator=generator)
        hessian = (x.T @ x).double().expand(count, -1, -1).to(device)
        seen = torch.full((count,), len(x))
        cross = hessian if method.drift > 0 else None
        problem = Problem(weight.to(device), hessian, seen, hessian[0], len(x), cross)
        matrices = method.solve(problem).matrices
        solver = _seconds(lambda: method.solve(problem))
        coder = _seconds(lambda: encode_experts("", range(count), matrices))
        a, b = torch.ones(2048, cols, device=device), torch.ones(cols, cols, device=device)
        product = _seconds(lambda: float((a @ b)[0, 0]))
        return cls(
            product=2.0 * len(a) * cols * cols / product,
            solver=count * _operations(rows, cols) / solver,
            coder=count * rows * cols / coder,
        )


def seconds(work: Work, speed: Speeds) -> float:
    """Wall time of the run on one process."""
    total = START + work.source / _DISK
    total += work.streams * _walk(work, work.tokens) / speed.product
    for layout in work.layouts:
        total += _module(work, layout, speed)
    last = work.layouts[-1]
    if work.own:  # pieces of one token, two, and so on
        said = work.own * (LENGTH - 1) // 2
        total += _walk(work, said, full=True) / speed.product
    if work.probed:
        total += _probe(work, speed)
        if last.weights > REHEARSE * sum(layout.weights for layout in work.layouts):
            total += _REHEARSED * _module(work, last, speed)
    for rows, cols in work.coded:
        total += 2.0 * work.tokens * cols * cols / speed.product
        sample = min(rows * cols, _DENSE_STEPS * probe.SAMPLE_WEIGHTS // 8)
        share = (rows * cols + sample) / (rows * cols)
        total += share * (_operations(rows, cols) / speed.solver + rows * cols / speed.coder)
    return total


def slots(config: Any, layouts: Sequence[ExpertsLayout]) -> int:
    """Experts of a token; where the config does not say, two."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    places = (text, getattr(text, "ffn_config", None))
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k")
    for place in places:
        for name in names:
            if isinstance(found := getattr(place, name, None), int):
                return found
    return min(2, max(layout.experts for layout in layouts))


def _operations(rows: int, cols: int) -> float:
    """Of the solver for one matrix."""
    return cols**2 * (_FACTOR * cols + _FEEDBACK * rows)


def _solved(projection: ProjectionShape, speed: Speeds) -> float:
    """Seconds for one expert's matrix, solved and coded."""
    rows, cols = projection.rows, projection.cols
    return _operations(rows, cols) / speed.solver + rows * cols / speed.coder


def _walk(work: Work, tokens: int, full: bool = False) -> float:
    """Operations of one stream's forwards: up to the experts and through; `full` is the whole model
    once, its experts and what lies outside the blocks included.
    """
    width = work.layouts[0].projections[0].cols
    once = 2.0 * work.dense + 4.0 * work.context * width * work.blocks
    if full:
        experts = sum(la.weights / la.experts * work.slots for la in work.layouts)
        return tokens * (once + 2.0 * (work.outside + experts)) * _LIGHT
    return 2.0 * tokens * once * _LIGHT


def _statistics(work: Work, layout: ExpertsLayout, tokens: int, streams: int) -> float:
    """Operations of a module's Hessians, of the activations in between and of the outputs."""
    each = 0.0
    for i, p in enumerate(layout.projections):
        each += p.cols**2 + (2 if i + 1 < len(layout.projections) else 1) * p.rows * p.cols
    return 2.0 * tokens * (work.slots * streams * each + layout.projections[0].cols ** 2)


def _module(work: Work, layout: ExpertsLayout, speed: Speeds) -> float:
    """Seconds for one experts module."""
    total = _statistics(work, layout, work.tokens, work.streams) / speed.product
    return total + layout.experts * sum(_solved(p, speed) for p in layout.projections)


def _probe(work: Work, speed: Speeds) -> float:
    """Seconds for one walk of the probe, which is what most runs need."""
    share = work.batch * probe.share(math.ceil(work.tokens / work.batch), work.batch)
    total = _walk(work, share) / speed.product
    for layout in work.layouts:
        total += _statistics(work, layout, share, 1) / speed.product
        total += len(probe.STEPS) * _sampled(layout, speed)
    bracket = probe.BRACKET * _solved(work.layouts[0].projections[0], speed)
    return total + bracket * sum(probe.samples(work.layouts[0])[:1])


def _sampled(layout: ExpertsLayout, speed: Speeds) -> float:
    """Seconds for a layer's sample at one step."""
    counts = iter(probe.samples(layout))
    return sum(next(counts) * _solved(p, speed) for _ in groups(layout) for p in layout.projections)


def _seconds(run: Callable[[], object]) -> float:
    run()
    start = time.perf_counter()
    run()
    return max(time.perf_counter() - start, 1e-6)
