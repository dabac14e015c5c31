"""What a compression will need, said before it begins, and a refusal where it cannot fit.

Peak memory of a process = what it holds already + everything outside the blocks + one block without
its experts + one group of experts with its Hessians + one forward of a batch + the activations for
which the rest of the budget has room. Nothing in it grows with the number of blocks or experts.
docs/scale.md compares it with measurements; qmoe.compression.estimate computes the time.
"""

import math
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qmoe.compression import estimate
from qmoe.compression.dense import BAND, DenseCoder
from qmoe.compression.job import Job
from qmoe.compression.layer import groups
from qmoe.errors import CapacityError
from qmoe.models.streamed import StreamedModel
from qmoe.system.text import size
from qmoe.types import ExpertsLayout

_CODE = 200 << 20  # bytes: compiled loops and library buffers that appear after the start
_SLACK = 1.05  # of the allocator
_HESSIANS = 8  # float64 matrices [cols, cols] per expert that are alive while a group is solved
_WEIGHTS = 5  # float32 copies of the widest projection of a group that are alive then
_FORWARD = 12  # float32 rows [tokens, widest dense matrix] alive in one forward
_FACTORS = 4  # float64 matrices [cols, cols] beside a dense matrix's Hessian while it is solved
_PLANES = 6  # float32 copies of a band of a dense matrix while it is coded
Shapes = Mapping[str, torch.Size]
_GUESS = {"rd": 1.0, "qmoe": 1.0, "rtn": 1.6, "gptq2": 2.2, "gptq3": 3.2, "gptq4": 4.2}


@dataclass(frozen=True)
class Needs:
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
        time = f"{self.seconds:.0f} s" if self.seconds < 120 else f"{self.seconds / 60:.0f} min"
        return (
            f"plan: read {size(self.read)}, write about {size(self.write)}, "
            f"memory {size(self.peak)} of each process, disk {size(self.disk)} "
            f"({size(self.free)} free), about {time} on one process"
        )


class _Model:
    """Bytes of a model's parameters in float32 but for the experts' matrices, and where they are.

    Attributes:
        shapes: of all parameters, by name.
        sizes: bytes of what is no expert's matrix, by name.
        names: of those in each block.
        blocks: bytes of each block.
        outside: bytes of everything outside the blocks.
        layouts: of the experts modules.
        coded: names of the parameters that `--dense-bits` codes.
    """

    def __init__(self, streamed: StreamedModel, dense: DenseCoder | None) -> None:
        self.shapes = {n: t.shape for n, t in streamed.model.state_dict().items()}
        encoded = {n for b in streamed.blocks() for n in streamed.encoded_names(b)}
        self.sizes = {n: 4 * s.numel() for n, s in self.shapes.items() if n not in encoded}
        prefixes = [f"{b.name}." for b in streamed.blocks()]
        self.names = [[n for n in self.sizes if n.startswith(prefix)] for prefix in prefixes]
        self.blocks = [sum(self.sizes[n] for n in block) for block in self.names]
        self.outside = sum(self.sizes.values()) - sum(self.blocks)
        self.layouts = [layout for layout, _ in streamed.experts]
        self.coded = dense.names() if dense is not None else set()


def make_plan(job: Job, out: Path, dense: DenseCoder | None = None) -> Needs:
    """Computes the plan from shapes, and the time from speeds that it measures.

    Args:
        job: the run, its model empty.
        out: where the result will be.
        dense: codes the matrices beside the experts; None leaves them as they are.

    Raises:
        CapacityError: `--memory` is below what one group of experts needs, or the disk has less
            room than the run needs.
    """
    model = _Model(job.streamed, dense)
    tokens = [sum(t.numel() for k, t in b.items() if k.endswith("input_ids")) for b in job.batches]
    streams = 2 if job.method.drift > 0 else 1
    memory = job.settings.memory
    floor = _floor(job, model, max(tokens))
    widths = [(la.projections[0].cols, la.projections[-1].rows) for la in model.layouts]
    slots = estimate.slots(job.streamed.config, model.layouts)
    activations = (
        streams * sum(tokens) * max(4 * (2 * i + slots * o) + 8 * slots for i, o in widths)
    )
    activations += (streams - 1) * sum(tokens) * 4 * max(o for _, o in widths)  # what was lost
    state = streams * sum(tokens) * 4 * max(max(w) for w in widths)
    store = max(0, memory - floor)
    write, growing = _written(job, model, dense)
    in_files = activations if job.world.size > 1 else max(0, activations - store)
    work = estimate.Work(
        layouts=model.layouts,
        tokens=sum(tokens),
        batch=max(tokens),
        context=max(t.shape[-1] for b in job.batches for t in b.values()),
        blocks=len(model.blocks),
        slots=slots,
        streams=streams,
        dense=sum(model.blocks) / 4,
        outside=model.outside / 4,
        source=job.streamed.checkpoint.source_bytes,
        probed=job.settings.target is not None,
        coded=[(model.shapes[n][0], model.shapes[n][1]) for n in model.coded],
        own=sum(tokens[len(tokens) - job.own :]),
    )
    speeds = estimate.Speeds.measured(job.method, model.layouts, job.streamed.device)
    plan = Needs(
        read=job.streamed.checkpoint.source_bytes,
        write=write,
        floor=floor,
        activations=activations,
        store=store,
        disk=int(write + growing + 2 * state + in_files),
        free=shutil.disk_usage(_existing(out)).free,
        seconds=estimate.seconds(work, speeds),
    )
    _refuse(plan, memory, out, model)
    return plan


def _floor(job: Job, model: _Model, tokens: int) -> int:
    """Bytes of a process without activations, with forwards of so many tokens."""
    sizes, coded = model.sizes, model.coded
    at_start = 1.25 * model.outside  # the stored form of one tensor comes on top while written
    solved = max(map(_group, model.layouts))
    if coded:
        tables = sum(sizes[n] for n in coded if not any(n in block for block in model.names))
        band = _band(model.shapes, coded)
        at_start += tables + band  # decoded values beside the originals
        solved = max(solved, band) + max(
            sum(sizes[n] + 8 * model.shapes[n][1] ** 2 for n in block if n in coded)
            for block in model.names
        )
        solved += tables
    on_the_way = (
        model.outside
        - sizes.get(job.streamed.head_name() or "", 0)
        + 1.5 * max(model.blocks)  # float32 beside the source's bytes while it is loaded
        + solved
        + tokens * 4 * _FORWARD * _widest(model.shapes, model.names)
    )
    return int(_resident() + _CODE + _SLACK * max(at_start, on_the_way))


def _written(job: Job, model: _Model, dense: DenseCoder | None) -> tuple[int, float]:
    """Bytes of the result, and of its largest block, which exists twice for a moment."""
    per_weight = job.settings.target or _GUESS.get(job.method.name.split("(")[0], 4.0)
    rate = dense.bits if dense is not None else 0.0
    stored = {
        n: int(model.shapes[n].numel() * rate / 8)
        if n in model.coded
        else stored_bytes(job.streamed, n, size)
        for n, size in model.sizes.items()
    }
    weights = sum(layout.weights for layout in model.layouts)
    write = int(weights * per_weight / 8) + sum(stored.values()) + carried_bytes(job.streamed)
    growing = max(sum(stored[n] for n in block) for block in model.names)
    return write, max(layout.weights for layout in model.layouts) * per_weight / 8 + growing


def _refuse(plan: Needs, memory: int, out: Path, model: _Model) -> None:
    """Raises CapacityError if the run cannot fit."""
    if memory < plan.floor:
        raise CapacityError(
            f"--memory {size(memory)} is too little for this model: one block without experts "
            f"({size(max(model.blocks))}), everything outside the blocks "
            f"({size(model.outside)}) and one group of experts with its Hessians "
            f"({size(max(map(_group, model.layouts)))}) need "
            f"{size(plan.floor)}; pass --memory {plan.floor / 2**30 + 0.1:.1f}GiB or more"
        )
    if plan.free < plan.disk:
        raise CapacityError(
            f"{_existing(out)} has {size(plan.free)} free, this run needs {size(plan.disk)} "
            f"({size(plan.write)} for the result, the rest while it runs); free some, choose "
            "another output directory or pass fewer --calib-tokens"
        )


def _group(layout: ExpertsLayout) -> int:
    """Bytes of the largest group of a layer while it is solved."""
    size = max(len(group) for group in groups(layout))
    matrix = max(p.rows * p.cols for p in layout.projections)
    every = sum(p.rows * p.cols for p in layout.projections)
    cells = max(p.cols**2 for p in layout.projections)
    first = layout.projections[0].cols ** 2
    return size * (4 * (2 * every + _WEIGHTS * matrix) + 8 * _HESSIANS * cells) + 8 * 3 * first


def _band(shapes: Shapes, coded: Collection[str]) -> int:
    """Bytes of the largest dense matrix while it is coded, beside its values and its Hessian."""
    return max(8 * _FACTORS * shapes[n][1] ** 2 for n in coded) + 4 * _PLANES * BAND


def _widest(shapes: Shapes, names: Sequence[Sequence[str]]) -> int:
    """Outputs of the widest dense matrix inside the blocks."""
    inside = (shapes[n] for block in names for n in block)
    return max((shape[0] for shape in inside if len(shape) == 2), default=1)


def stored_bytes(streamed: StreamedModel, name: str, size: int) -> int:
    """Bytes of a tensor that is stored as it is in the source; `size` in float32."""
    disks = sorted(streamed.sources.get(name, ()))
    return size // 4 * streamed.checkpoint.dtype(disks[0]).itemsize if disks else 0


def carried_bytes(streamed: StreamedModel) -> int:
    """Bytes of the tensors that no module takes."""
    source = streamed.checkpoint
    return sum(math.prod(source.shape(n)) * source.dtype(n).itemsize for n in streamed.unused)


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
