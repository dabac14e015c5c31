"""What the lanes of a warp touch, step by step: the batch-1 loop of `qmoe.kernels.matvec` followed
in torch, to count cache lines.

A load of a warp costs the L1 cache about a cycle per distinct line of 128 bytes, and shared memory
a cycle per distinct word in the fullest of its 32 banks; this counts them on real streams.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from qmoe.kernels.interleave import LANES
from qmoe.kernels.pack import MAP_WIDTH, PackedProjection
from qmoe.kernels.twins import lanes_of

LINE = 128


@dataclass(frozen=True)
class Touched:
    """Means over the steps of a warp (one step = one symbol of each lane).

    Attributes:
        table_banks, input_banks: cycles of the lookup and of x if they are in shared memory.
        table, inputs, words, classes: distinct lines per step of the lookup, of x, of refills, and
            of class and context map loads.
        steps: symbols that a warp steps through.
        steps_per_weight: symbols stepped per coded weight, counting lanes that wait for others.
        symbols_per_weight: the same without waiting.
    """

    table_banks: float
    input_banks: float
    table: float
    inputs: float
    words: float
    classes: float
    steps: float
    steps_per_weight: float
    symbols_per_weight: float

    def cycles(self, tables: bool = False, inputs: bool = False) -> float:
        """L1 cycles per step, with tables or inputs in shared memory or in the cache."""
        table, x = (self.table_banks, self.table), (self.input_banks, self.inputs)
        return table[not tables] + x[not inputs] + self.words + self.classes


def mean(parts: Sequence[Touched]) -> Touched:
    """Of several experts of one shape, weighted by their steps."""
    weight = [t.steps_per_weight for t in parts]

    def of(name: str) -> float:
        shares = [1.0] * len(parts) if "steps" in name or "symbols" in name else weight
        total = sum(getattr(t, name) * w for t, w in zip(parts, shares, strict=True))
        return float(total / sum(shares))

    return Touched(**{f.name: of(f.name) for f in fields(Touched)})


def trace(
    p: PackedProjection, expert: int, programs: int = 64, input_bytes: int = 2, warps: int = 1
) -> Touched:
    """Follows up to `programs` evenly spaced warps of an expert; `warps` neighbours are a program
    and wait for each other.
    """
    chosen = torch.linspace(0, p.programs - 1, min(programs, p.programs)).long()
    lanes = lanes_of(p, expert)
    row, base, at, used, pos, steps = (
        t.view(-1, LANES)[chosen]
        for t in (
            lanes.row, lanes.row_class, lanes.word, lanes.used, lanes.position, lanes.steps,
        )
    )  # fmt: skip
    own, steps = steps, steps[:, :1]
    piece = (chosen // p.tiles // p.segments)[:, None]
    if warps > 1:
        steps = _longest(p, lanes.steps, chosen, warps)
    words, lut = p.words.long() & 0xFFFFFFFF, p.lut.long() & (0xFFFFFFFF if p.wide else 0xFFFF)
    bits, first_map, first_entry, limit = p.expert_info[expert].tolist()
    maps = p.context_maps.flatten()[first_map : first_map + MAP_WIDTH].long()
    value_bits, entry_bytes = (8, 4) if p.wide else (6, 2)
    sums = dict.fromkeys((f.name for f in fields(Touched)[:6]), 0.0)
    running = useful = 0
    for step in range(int(steps.max())):
        live = (step < steps).expand_as(pos)
        place = pos.clamp(max=p.classes.shape[2] - 1)
        column = p.classes[expert, piece, place].long()
        sums["classes"] += _lines(place, live) + _lines((base + column) * 4, live)
        table = first_entry + maps[base + column]
        low, high = words[at.clamp(max=len(words) - 33)], words[(at + 32).clamp(max=len(words) - 1)]
        window = low >> used | (high << (32 - used)) & 0xFFFFFFFF
        for _ in range(32 // bits):
            useful += int((live & (pos < limit) & (row < p.rows) & (step < own)).sum())
            running += int(live.sum())
            index = table + (window & ((1 << bits) - 1))
            entry = lut[index]
            length = entry >> (6 + value_bits)
            window, used, pos = window >> length, used + length, pos + (entry & 63)
            sums["table_banks"] += _banks((index - first_entry) * entry_bytes, live)
            sums["input_banks"] += _banks(pos * input_bytes, live)
            sums["table"] += _lines(index * entry_bytes, live)
            sums["inputs"] += _lines(pos * input_bytes, live)
        pos = pos.clamp(max=limit)
        need = used >= 32
        sums["words"] += _lines((at + 96) * 4, live & need)
        at, used = at + 32 * need, used & 31
    count = running / 32
    return Touched(
        **{name: s / count for name, s in sums.items()},
        steps=count / len(chosen),
        steps_per_weight=running / _weights(p, row),
        symbols_per_weight=useful / _weights(p, row),
    )


def _longest(p: PackedProjection, steps: Tensor, chosen: Tensor, warps: int) -> Tensor:
    """Steps [programs, 1] of the longest of the `warps` neighbours of each program."""
    first_tile = chosen - chosen % p.tiles % warps
    last_tile = chosen - chosen % p.tiles + p.tiles - 1
    mates = torch.stack([torch.minimum(first_tile + k, last_tile) for k in range(warps)])
    return steps[mates * LANES].amax(0)[:, None]


def _weights(p: PackedProjection, row: Tensor) -> float:
    """Weights behind the lanes; columns of zeros are weights, too."""
    # a segment is its part of a stream, on average
    return float((row < p.rows).sum()) / p.segments * p.cols / p.pieces


def _lines(address: Tensor, live: Tensor) -> float:
    """Distinct lines over the lanes of each program, summed over programs."""
    line = torch.where(live, address // LINE, -1).sort(dim=1).values
    fresh = (line[:, 1:] != line[:, :-1]) & (line[:, 1:] >= 0)
    return float(fresh.sum() + (line[:, 0] >= 0).sum())


def _banks(address: Tensor, live: Tensor) -> float:
    """Distinct words in the fullest bank of each program, summed over programs."""
    word = torch.where(live, address // 4, -1).sort(dim=1).values
    fresh = (word >= 0) & torch.nn.functional.pad(word[:, 1:] != word[:, :-1], (1, 0), value=True)
    count = torch.zeros(len(word), 32, dtype=torch.long)
    count.scatter_add_(1, word.clamp(min=0) % 32, fresh.long())
    return float(count.max(dim=1).values.sum())
