"""The time of a batch-1 launch by a model: the real machine code of the loop, issued in order by
one scheduler with assumed latencies, for as many warps as a scheduler has.

Nothing here is measured. Assumed, from published microbenchmarks of Hopper: cycles until a result
may be used of 4 (arithmetic), 5 (wide multiply), 29 (shared memory), 35 (L1), 270 (L2), 650 (DRAM);
an instruction a cycle and scheduler, one of the integer pipe every two; 1.75 GHz, 132 SMs. Before
the loop a launch takes START cycles, for its dependent loads, and 3 a machine instruction.
"""

import heapq
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qmoe.kernels.interleave import LANES
from qmoe.kernels.launch import LaunchPlan, segments
from qmoe.kernels.pack import PackedProjection
from qmoe.kernels.twins import lanes_of
from qmoe.measure.kernels.sample import packed, sample_matrix
from qmoe.measure.kernels.sass import ALU, loop_lines

ARITHMETIC, WIDE, SHARED, L1, L2, DRAM = 4, 5, 29, 35, 270, 650
START = 1500
SECTOR = 8  # words
CLOCK, SMS, SCHEDULERS = 1.75e9, 132, 4
_OPERAND = re.compile(r"\b(U?R\d+|U?P\d)\b")


@dataclass(frozen=True)
class Step:
    """One machine instruction: opcode, registers written and read, whether it is the load of a
    stream's next word.
    """

    op: str
    writes: tuple[str, ...]
    reads: tuple[str, ...]
    refill: bool = False


def steps_of(lines: Sequence[str]) -> list[Step]:
    """The instructions of a loop of a `nvdisasm -c` listing."""
    found = [
        re.search(r"\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z0-9.]+)\s*(.*?)\s*;", line) for line in lines
    ]
    parsed = [(m[1], m[2], [o.strip() for o in m[3].split(",")]) for m in found if m]
    last = max((i for i, (_, op, _) in enumerate(parsed) if op.startswith("LDG")), default=-1)
    return [_step(guard, op, args, i == last) for i, (guard, op, args) in enumerate(parsed)]


def _step(guard: str | None, op: str, args: list[str], refill: bool) -> Step:
    head = op.split(".")[0]
    count = {"ISETP": 2, "FSETP": 2, "PLOP3": 2}.get(head, 1)
    if head in ("STS", "STG", "BRA", "EXIT", "BAR", "NOP"):
        count = 0
    writes = [r for a in args[:count] for r in _OPERAND.findall(a)]
    if count == 1 and len(args) > 1 and re.match(r"!?U?P\d$", args[1]):
        writes += _OPERAND.findall(args[1])  # a carry or a comparison beside the result
    reads = [r for a in args[count:] for r in _OPERAND.findall(a)]
    reads += [f"R{int(n) + 1}" for a in args[count:] for n in re.findall(r"\bR(\d+)\.64", a)]
    pair = writes and writes[0].startswith("R") and ("WIDE" in op or ".64" in op)
    if pair and not op.startswith("SHF"):
        writes.append(f"R{int(writes[0][1:]) + 1}")
    if "WIDE" in op and (m := re.match(r"R(\d+)", args[-1])):
        reads.append(f"R{int(m[1]) + 1}")
    if guard:
        reads += [guard, *writes]  # where the guard is false, the old value stays
    return Step(op, tuple(writes), tuple(reads), refill)


def cycles(loop: Sequence[Step], turns: int, warps: int, refill: Callable[[int, int], int]) -> int:
    """Cycles of `warps` warps on one scheduler for `turns` turns each; `refill(warp, turn)` is the
    latency of the load of a word.
    """
    ready: list[dict[str, int]] = [{} for _ in range(warps)]
    place, turn = [0] * warps, [0] * warps
    # (when the warp can issue, who)
    queue = [(7 * w, w) for w in range(warps)]
    heapq.heapify(queue)
    now = pipe = 0
    while queue:
        at, w = heapq.heappop(queue)
        step, mine = loop[place[w]], ready[w]
        integer = step.op.split(".")[0] in ALU
        at = max(at, now, pipe if integer else 0)
        if queue and queue[0][0] < at:  # another warp can go first
            heapq.heappush(queue, (at, w))
            continue
        if integer:
            pipe = at + 2
        latency = ARITHMETIC
        if step.op.startswith("LDS"):
            latency = SHARED
        elif step.op.startswith("LDG"):
            latency = refill(w, turn[w]) if step.refill else L1
        elif "WIDE" in step.op:
            latency = WIDE
        for r in step.writes:
            mine[r] = at + latency
        now = at + 1
        place[w] += 1
        if place[w] == len(loop):
            place[w], turn[w] = 0, turn[w] + 1
            if turn[w] == turns:
                continue
        following = loop[place[w]]
        when = max((mine.get(r, 0) for r in following.reads), default=0)
        heapq.heappush(queue, (max(now, when), w))
    return now


def refills(p: PackedProjection, expert: int = 0) -> NDArray[np.int8]:
    """What each warp's load of words meets in each turn: 0 nothing new, 1 a new sector of a line
    that it had, 2 a new line; int8 [warps, turns].
    """
    lanes = lanes_of(p, expert)
    row_class, at, end, used, pos, steps = (
        getattr(lanes, name).numpy()
        for name in ("row_class", "word", "end", "used", "position", "steps")
    )
    n = np.arange(len(at))
    tile = p.records[expert, :, 0].view(p.pieces, 1, p.tiles, 1).long()
    first = tile.expand(-1, p.segments, -1, LANES).reshape(-1).numpy()
    piece = n // LANES // p.tiles // p.segments
    words = p.words.numpy().view(np.uint32).astype(np.uint64)
    lut = p.lut.numpy().astype(np.int64) & (0xFFFFFFFF if p.wide else 0xFFFF)
    bits, first_map, first_entry, limit = p.expert_info[expert].tolist()
    maps = p.context_maps.flatten().numpy().astype(np.int64)[first_map:]
    value_bits = 8 if p.wide else 6
    classes = p.classes[expert].numpy().astype(np.int64)
    kind = np.zeros((len(n) // LANES, int(steps.max())), np.int8)
    seen: list[set[tuple[int, int]]] = [set() for _ in range(len(kind))]
    for i, line in enumerate((at - first) // LANES):  # before the loop
        seen[i // LANES] |= {(int(line) + k, i % LANES // SECTOR) for k in range(3)}
    for t in range(kind.shape[1]):
        column = classes[piece, np.minimum(pos, classes.shape[1] - 1)]
        table = first_entry + maps[row_class + column]
        high = words[np.minimum(at + 32, len(words) - 1)]
        both = words[np.minimum(at, len(words) - 33)] | high << np.uint64(32)
        for _ in range(32 // bits):
            window = (both >> used.astype(np.uint64)).astype(np.int64)
            entry = lut[table + (window & ((1 << bits) - 1))]
            used, pos = used + (entry >> (6 + value_bits)), pos + (entry & 63)
        pos = np.minimum(pos, limit)
        need, word = used >= 32, at + 96
        load = (need & (word < end) & (t < steps)).reshape(-1, LANES)
        line = ((word - first) // LANES).reshape(-1, LANES)
        for w, lane in zip(*np.nonzero(load), strict=True):
            where = int(line[w, lane]), int(lane) // SECTOR
            if where not in seen[w]:
                fresh = all((where[0], k) not in seen[w] for k in range(LANES // SECTOR))
                kind[w, t] = max(kind[w, t], 1 + fresh)
                seen[w].add(where)
        at, used = at + LANES * need, used & 31
    return kind


@dataclass(frozen=True)
class Modelled:
    """A launch by the model.

    Attributes:
        warps: on an SM, on the fullest scheduler (its programs in one wave, if they fit).
        turns: of the loop, a warp.
        microseconds: with words from the L2 cache where they are prefetched, else from memory.
        saturated: cycles a turn and warp when a scheduler has many.
        weights_per_s: decoded.
    """

    warps: float
    turns: int
    microseconds: float
    saturated: float
    weights_per_s: float


def launch_time(
    p: PackedProjection, listing: str, experts: float, warps: int, prefetched: bool
) -> Modelled:
    """The launch of `experts` experts like the first of `p`, one token.

    Args:
        p: a projection.
        listing: `nvdisasm -c` of its kernel.
        experts: of a token.
        warps: of a program.
        prefetched: whether the words are in the L2 cache when the loop comes to them.
    """
    body, before, after = loop_lines(listing)
    loop, kind = steps_of(body), refills(p)
    groups = lanes_of(p, 0).steps.view(p.pieces * p.segments, -1, LANES)[:, :, 0]
    padded = torch.nn.functional.pad(groups, (0, -groups.shape[1] % warps))
    turns = round(float(padded.view(-1, warps).amax(1).float().mean()))
    programs = experts * padded.numel() / warps
    of_scheduler = programs * warps / SMS / SCHEDULERS
    fullest = (
        math.ceil(programs / SMS) * warps / SCHEDULERS if programs < 16 * SMS else of_scheduler
    )
    latency = (L1, L2, L2 if prefetched else DRAM)

    def refill(w: int, t: int) -> int:
        return latency[kind[w % len(kind), min(t, kind.shape[1] - 1)]]

    whole = math.ceil(fullest)
    total = cycles(loop, turns, whole, refill) * fullest / whole + START + 3 * (before + after)
    many = cycles(loop, turns, 14, refill) / turns / 14
    seconds = total / CLOCK
    rate = experts * p.rows * p.cols / seconds
    return Modelled(of_scheduler * SCHEDULERS, turns, 1e6 * seconds, many, rate)


@dataclass(frozen=True)
class Projected:
    """A projection of a model in the table: rows and cols, experts of a token."""

    name: str
    rows: int
    cols: int
    experts: int


SHAPES = (
    Projected("Qwen3-30B-A3B up", 1536, 2048, 8),
    Projected("Qwen3-30B-A3B down", 2048, 768, 8),
    Projected("DeepSeek-V3 up", 4096, 7168, 8),
)
_SAMPLE_ROWS = 1536  # matrices with more rows are represented by so many


def table(
    listing_of: Callable[[int], str], plan: LaunchPlan, bf16_weights: float
) -> list[dict[str, Any]]:
    """Modelled launches of one token of SHAPES.

    Args:
        listing_of: machine code of the shared-memory kernel for a number of segments.
        plan: that cuts the streams.
        bf16_weights: weights a second that a bf16 product reads.

    Returns:
        A row each: name, segments, warps_per_sm, us, bf16_floor_us, weights_per_s.
    """
    rows = []
    for shape in SHAPES:
        cut = segments(plan, shape.rows, shape.cols, shape.experts)
        height = min(shape.rows, _SAMPLE_ROWS)
        p = packed([sample_matrix(height, shape.cols)], cut)
        copies = shape.rows / height * shape.experts
        made = launch_time(p, listing_of(cut), copies, plan.warps, prefetched=True)
        weights = shape.rows * shape.cols * shape.experts
        rows.append(
            {
                "name": shape.name,
                "segments": cut,
                "warps_per_sm": made.warps,
                "us": made.microseconds,
                "bf16_floor_us": 1e6 * weights / bf16_weights,
                "weights_per_s": made.weights_per_s,
            }
        )
    return rows
