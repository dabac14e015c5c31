"""What a compression will need, said before it begins, and a refusal where it cannot fit.

Peak memory of a process = what it holds already + everything outside the blocks + one block without
its experts + one group of experts with its Hessians + one forward of a batch + the activations for
which the rest of the budget has room. Nothing in it grows with the number of blocks or experts.
docs/scale.md compares it with measurements.
"""

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmoe.errors import CapacityError
from qmoe.families.base import ExpertsLayout
from qmoe.host import Host
from qmoe.layer import groups
from qmoe.quantize import Method

_CODE = 200 << 20  # bytes: compiled loops and library buffers that appear after the start
_SLACK = 1.05  # of the allocator
_HESSIANS = 8  # float64 matrices [cols, cols] per expert that are alive while a group is solved
_WEIGHTS = 5  # float32 copies of the widest projection of a group that are alive then
_FORWARD = 12  # float32 rows [tokens, widest dense matrix] alive in one forward
_SPEED = 15e6  # expert weights per second and core that are coded; solver and Hessians come on top
_DISK = 200e6  # bytes per second, a slow disk
_GUESS = {"rd": 1.0, "qmoe": 1.0, "rtn": 1.6, "gptq2": 2.2, "gptq3": 3.2, "gptq4": 4.2}


@dataclass(frozen=True)
class Plan:
    """Needs of a run, in bytes and seconds.

    Attributes:
        read: bytes of the source that are read, once.
        write: bytes of the result, estimated.
        floor: memory of a process without activations.
        activations: what the experts of one block and both streams keep; beyond `store` it lies in
            mapped files.
        store: room for activations in memory.
        disk: free space needed beside the result's own bytes while the run lasts, and these.
        free: free space.
        seconds: estimated, with one process.
    """

    read: int
    write: int
    floor: int
    activations: int
    store: int
    disk: int
    free: int
    seconds: float

    @property
    def peak(self) -> int:
        """Memory of a process at its highest."""
        return self.floor + min(self.store, self.activations)

    def text(self) -> str:
        """One line for people."""
        minutes = self.seconds / 60
        return (
            f"plan: read {_size(self.read)}, write about {_size(self.write)}, "
            f"memory {_size(self.peak)} of each process, disk {_size(self.disk)} "
            f"({_size(self.free)} free), about {minutes:.0f} min on one process"
        )


def make_plan(
    host: Host,
    method: Method,
    batches: Sequence[dict[str, Tensor]],
    memory: int,
    out: Path,
    bits: float | None,
) -> Plan:
    """Computes the plan from shapes alone.

    Args:
        host: the empty model.
        method: the solver.
        batches: calibration tokens.
        memory: bytes that a process may use.
        out: where the result will be.
        bits: stored bits per expert weight that are aimed at, if any.

    Raises:
        CapacityError: `memory` is below what one group of experts needs, or the disk has less room
            than the run needs.
    """
    sizes = {n: 4 * t.numel() for n, t in host.model.state_dict().items()}
    encoded = {n for b in host.blocks() for n in host.encoded_names(b)}
    blocks = [
        sum(s for n, s in sizes.items() if n.startswith(f"{b.name}.") and n not in encoded)
        for b in host.blocks()
    ]
    outside = sum(s for n, s in sizes.items() if n not in encoded) - sum(blocks)
    layouts = [layout for layout, _ in host.experts]
    tokens = [sum(t.numel() for k, t in b.items() if k.endswith("input_ids")) for b in batches]
    streams = 2 if method.drift > 0 else 1
    rows = sum(tokens)

    head = host.head_name()
    at_start = 1.25 * outside  # the stored form of one tensor comes on top while it is written
    on_the_way = (
        outside
        - sizes.get(head or "", 0)
        + 1.5 * max(blocks)  # float32 beside the source's bytes while it is loaded
        + max(_group(layout) for layout in layouts)
        + max(tokens) * 4 * _FORWARD * _widest(sizes, encoded, host)
    )
    floor = int(_resident() + _CODE + _SLACK * max(at_start, on_the_way))
    widths = [(la.projections[0].cols, la.projections[-1].rows) for la in layouts]
    slots = _slots(host.config, layouts)
    activations = streams * rows * max(4 * (2 * i + slots * o) + 8 * slots for i, o in widths)
    state = streams * rows * 4 * max(max(w) for w in widths)
    store = max(0, memory - floor)

    weights = sum(layout.weights for layout in layouts)
    per_weight = bits or _GUESS.get(method.name.split("(")[0], 4.0)
    dense = sum(s for n, s in sizes.items() if n not in encoded) // 2
    write = int(weights * per_weight / 8) + dense
    largest = max(layout.weights for layout in layouts) * per_weight / 8 + max(blocks) / 2
    disk = int(write + largest + 2 * state + max(0, activations - store))
    plan = Plan(
        read=host.checkpoint.source_bytes,
        write=write,
        floor=floor,
        activations=activations,
        store=store,
        disk=disk,
        free=shutil.disk_usage(_existing(out)).free,
        seconds=_seconds(host, layouts, rows, slots, streams, weights),
    )
    if memory < floor:
        raise CapacityError(
            f"--memory {_size(memory)} is too little for this model: one block without experts "
            f"({_size(max(blocks))}), everything outside the blocks ({_size(outside)}) and one "
            f"group of experts with its Hessians ({_size(max(map(_group, layouts)))}) need "
            f"{_size(floor)}; pass --memory {floor / 2**30 + 0.1:.1f}GiB or more"
        )
    if plan.free < disk:
        raise CapacityError(
            f"{_existing(out)} has {_size(plan.free)} free, this run needs {_size(disk)} "
            f"({_size(write)} for the result, the rest while it runs); free some, choose another "
            "output directory or pass fewer --calib-tokens"
        )
    return plan


def _group(layout: ExpertsLayout) -> int:
    """Bytes of the largest group of a layer while it is solved."""
    size = max(len(group) for group in groups(layout))
    matrix = max(p.rows * p.cols for p in layout.projections)
    every = sum(p.rows * p.cols for p in layout.projections)
    cells = max(p.cols**2 for p in layout.projections)
    first = layout.projections[0].cols ** 2
    return size * (4 * (2 * every + _WEIGHTS * matrix) + 8 * _HESSIANS * cells) + 8 * 3 * first


def _widest(sizes: dict[str, int], encoded: set[str], host: Host) -> int:
    """Outputs of the widest dense matrix inside the blocks."""
    inside = tuple(f"{b.name}." for b in host.blocks())
    shapes = [
        t.shape[0]
        for n, t in host.model.state_dict().items()
        if n.startswith(inside) and n not in encoded and t.ndim == 2
    ]
    return max(shapes, default=1)


def _slots(config: Any, layouts: Sequence[ExpertsLayout]) -> int:
    """Experts of a token; where the config does not say, two."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    places = (text, getattr(text, "ffn_config", None))
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k")
    for place in places:
        for name in names:
            if isinstance(found := getattr(place, name, None), int):
                return found
    return min(2, max(layout.experts for layout in layouts))


def _seconds(
    host: Host,
    layouts: Sequence[ExpertsLayout],
    rows: int,
    slots: int,
    streams: int,
    weights: int,
) -> float:
    """Time on this machine's CPU: the arithmetic at the measured speed of a matrix product, coding
    at a fixed one.
    """
    dense = float(sum(p.numel() for p in host.model.parameters()) - weights)
    flops = 2.0 * 2 * streams * rows * dense  # two forwards: up to the experts, and through
    for layout in layouts:
        share = rows * slots
        for p in layout.projections:
            flops += 2.0 * share * streams * (p.cols**2 + 2 * p.rows * p.cols)
            flops += layout.experts * p.cols**2 * (5.0 * p.cols + 8 * p.rows)  # see docs/scale.md
    cores = torch.get_num_threads()
    coding = weights / (_SPEED * cores)
    return float(flops / _matmul_speed() + coding + host.checkpoint.source_bytes / _DISK)


def _matmul_speed() -> float:
    """Floating point operations per second of a float32 product, measured in some milliseconds."""
    a = torch.ones(768, 768)
    a @ a  # the first call starts threads
    start = time.perf_counter()
    for _ in range(3):
        a @ a
    seconds: float = time.perf_counter() - start
    return 6.0 * 768 * 768 * 768 / seconds


def _resident() -> int:
    """Bytes of resident memory of this process now."""
    try:
        with open("/proc/self/statm", encoding="ascii") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 1 << 29  # no proc file system; the libraries take about this much


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _size(n: float) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"
