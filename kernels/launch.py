"""Launch plans: how a layer's shape is cut into programs on an architecture. A table and its
arithmetic; nothing is tuned at run time.

`scripts/tune` measures on a GPU and prints the rows for `PLANS`; the costs are an H100's, which
other architectures have on trust, and unknown ones use the row of the next older one. A device may
be given another plan (`choose`): `qmoe.kernels.selfcheck` does.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class LaunchPlan:
    """Choices for one architecture.

    Attributes:
        segment: columns of a stream below which it is not cut further when a model is loaded.
        fill: lanes that a batch-1 launch should have at least, 24 warps an SM; streams are cut into
            segments until it does.
        costs: relative time of the matvec loop with 1, 2, 4 and 8 tokens per expert.
        tile_cost: relative time of decoding an expert to a tile, and of one tile of tokens times
            it.
        token_tile, row_tile, depth_tile: block of the grouped product (tokens, rows, columns).
        dot_warps, dot_stages: warps and pipeline stages of the grouped product; float_stages: the
            latter for operands of 4 bytes.
        scratch_bytes: decoded experts that are held at a time for the grouped product: enough of
            them to fill the GPU.
        asm: inline PTX for address arithmetic.
        shared: lookup tables and one token's inputs in shared memory, where the codes and this
            Triton allow it (`qmoe.kernels.shared.fits`); the plain loop otherwise. Both give the
            same bits.
        warps: warps of a matvec program, a power of two; they share what is in shared memory.
        pdl: launches of a layer overlap (programmatic dependent launch).
    """

    segment: int = 192
    fill: int = 132 * 24 * 32
    costs: tuple[float, float, float, float] = (1.0, 1.1, 1.46, 3.0)
    tile_cost: tuple[float, float] = (4.4, 2.2)
    token_tile: int = 64
    row_tile: int = 128
    depth_tile: int = 64
    dot_warps: int = 8
    dot_stages: int = 3
    float_stages: int = 3
    scratch_bytes: int = 128 << 20
    asm: bool = True
    shared: bool = True
    warps: int = 4
    pdl: bool = False


BATCHES = (1, 2, 4, 8)
PLANS = {
    80: LaunchPlan(fill=108 * 24 * 32),
    89: LaunchPlan(fill=128 * 24 * 32),
    90: LaunchPlan(pdl=True),
    100: LaunchPlan(fill=148 * 24 * 32, pdl=True),
}
# the interpreter and AMD, whose programs have 64 KiB of shared memory; costs are guesses
PORTABLE = LaunchPlan(asm=False, shared=False, warps=1, float_stages=1, tile_cost=(1.6, 0.4))


def plan_for(capability: int) -> LaunchPlan:
    """LaunchPlan of a CUDA compute capability (10 * major + minor); `PORTABLE` below 8.0."""
    known = [c for c in PLANS if c <= capability]
    return PLANS[max(known)] if known else PORTABLE


_forced: list[LaunchPlan] = []
_chosen: dict[torch.device, LaunchPlan] = {}


@contextmanager
def forced(plan: LaunchPlan) -> Iterator[None]:
    """Every device has this plan inside the context, and operators run their kernels on it, on a
    CPU too; for measurements and tests, not thread-safe.
    """
    _forced.append(plan)
    try:
        yield
    finally:
        _forced.pop()


def is_forced() -> bool:
    """Whether a `forced` context is open."""
    return bool(_forced)


def choose(device: torch.device, plan: LaunchPlan) -> None:
    """Gives a device another plan from now on."""
    _chosen[device] = plan


def plan_of(device: torch.device) -> LaunchPlan:
    """LaunchPlan of a device."""
    if _forced:
        return _forced[-1]
    return _chosen.get(device) or _plan_of(device)


@lru_cache
def _plan_of(device: torch.device) -> LaunchPlan:
    if device.type != "cuda" or torch.version.hip is not None:
        return PORTABLE
    major, minor = torch.cuda.get_device_capability(device)
    return plan_for(10 * major + minor)


def segments(plan: LaunchPlan, rows: int, cols: int, top_k: int) -> int:
    """Segments per stream so that one token's experts fill the GPU, without segments below
    `plan.segment` columns.
    """
    pieces = -(-cols // 1024)
    wanted = round(plan.fill / max(1, rows * pieces * top_k))
    return max(1, min(wanted, 8, -(-cols // pieces) // plan.segment))


@lru_cache(maxsize=4096)
def batch_of(plan: LaunchPlan, tokens: int, top_k: int, experts: int) -> int:
    """Tokens per expert that one pass of the matvec handles, 1, 2, 4 or 8; 0 = the grouped product
    is cheaper.

    Expected cost if every token picked its experts evenly: a pass per started group of B tokens,
        against decoding each expert that has any token once and multiplying it with tiles of
        tokens.
    """
    if tokens == 1:
        return 1
    n, p = _tokens_of_an_expert(tokens, min(1.0, top_k / experts))
    cost = {b: float((p * -(-n // b)).sum()) * c for b, c in zip(BATCHES, plan.costs, strict=True)}
    tiles = float((p * -(-n // plan.token_tile)).sum())
    cost[0] = float(p.sum()) * plan.tile_cost[0] + tiles * plan.tile_cost[1]
    return min(cost, key=lambda b: (cost[b], b))


def _tokens_of_an_expert(
    tokens: int, share: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Numbers of tokens above 0 that an expert may get, and how likely they are: binomial, within
    12 standard deviations. A prompt of any length takes a fraction of a millisecond.
    """
    if share >= 1:
        return np.array([tokens]), np.ones(1)
    mean = tokens * share
    reach = 12 * math.sqrt(mean * (1 - share)) + 12
    first, last = max(1, int(mean - reach)), min(tokens, int(mean + reach) + 1)
    n = np.arange(first, last + 1)
    odds = share / (1 - share)
    log = math.lgamma(tokens + 1) - math.lgamma(first + 1) - math.lgamma(tokens - first + 1)
    log += first * math.log(share) + (tokens - first) * math.log1p(-share)
    steps = np.log((tokens - n[:-1]) / n[1:] * odds)
    return n, np.exp(log + np.concatenate([[0.0], np.cumsum(steps)]))
