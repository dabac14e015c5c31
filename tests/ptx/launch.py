"""Triton launches on CPU tensors, by executing their PTX.

    with executed(90) as session:
        y = project(p, x, index, fan, batch=1)

Triton's own launcher binds, specializes and compiles as it would on the GPU; only loading the
binary and starting it is replaced. Inside the context the operators of `qmoe.kernels` run their
kernels on CPU tensors, by the plan of the capability.
"""

import os
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.compiler import CompiledKernel

from ptx import parse as parsing
from ptx.faults import Fault
from ptx.machine import Machine
from ptx.memory import Global
from qmoe.kernels.launch import forced, plan_for

GRID = (2**31 - 1, 65535, 65535)
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a CTA may have

parse = lru_cache(maxsize=None)(parsing.parse)


class Driver:
    """What Triton's launcher asks a driver before it compiles."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, device):
        return 0


@dataclass
class Launch:
    """What was launched: kernel name, grid, whether it may overlap the one before, the compiled
    kernel, and warps by basic block."""

    name: str
    grid: tuple
    dependent: bool
    kernel: object
    counts: Counter


@dataclass
class Session:
    """Launches of a context, and which bytes of fresh memory were written.

    `change` is applied to the PTX of the kernels it is given for: {kernel name: text -> text}. With
    `dry`, launches are compiled and their limits checked, but nothing runs.
    """

    capability: int
    launches: list = field(default_factory=list)
    fresh: dict = field(default_factory=dict)  # storage -> (written bytes, a tensor to keep it)
    change: dict = field(default_factory=dict)
    last: set = field(default_factory=set)  # storages that the last launch wrote
    dry: bool = False

    def mark(self, t):
        """Fresh memory holds nothing."""
        if type(t) is torch.Tensor and t.device.type == "cpu" and t.numel():
            s = t.untyped_storage()
            self.fresh[s.data_ptr()] = np.zeros(s.nbytes(), bool), t
        return t

    def launch(self, kernel, g0, g1, g2, stream, function, packed, metadata, enter, leave, *args):
        """Stands where Triton's launcher starts the binary."""
        grid = (g0, g1, g2)
        if not all(0 < n <= most for n, most in zip(grid, GRID, strict=True)):
            raise Fault(f"{kernel.name}: a grid of {grid}, at most {GRID}")
        if kernel.metadata.shared > SHARED[self.capability] << 10:
            raise Fault(f"{kernel.name}: {kernel.metadata.shared} bytes of shared memory")
        dependent = bool(getattr(kernel.metadata, "launch_pdl", False))
        if self.dry:
            self.launches.append(Launch(kernel.name, grid, dependent, kernel, Counter()))
            return
        memory, storages, values = Global(), {}, []
        types = {n: k for n, k in kernel.src.signature.items() if k != "constexpr"}
        for (name, kind), value in zip(kernel.src.signature.items(), args, strict=True):
            if kind != "constexpr":
                is_tensor = isinstance(value, torch.Tensor)
                values.append(self._place(memory, storages, name, value) if is_tensor else value)
        change = self.change.get(kernel.name)
        text = kernel.asm["ptx"]
        code = parse(text if change is None else change(text))
        values = [*map(int, values), 0, 0][: len(code.params)]  # scratch that nothing uses
        early = {n for s, n in storages.items() if s not in self.last} if dependent else None
        tensors = dict(zip(storages, memory.tensors, strict=True))
        machine = Machine(code, grid, memory, values, kernel.metadata.shared, early)
        try:
            machine.run()
        except Fault as e:
            raise Fault(f"{kernel.name}, grid {grid}, {types}: {e}") from None
        self.last = {s for s, t in tensors.items() if t.writer is not None}
        self.launches.append(Launch(kernel.name, grid, dependent, kernel, machine.counts))

    def _place(self, memory, storages, name, value):
        s = value.untyped_storage()
        at = s.data_ptr()
        if at not in storages:
            data = torch.empty(0, dtype=torch.uint8).set_(s).numpy()
            memory.add(data, self.fresh.get(at, (None,))[0], name)
            storages[at] = name
        base = memory.tensors[list(storages).index(at)].base
        return base + value.data_ptr() - at


@contextmanager
def executed(capability=90, plan=None):
    """Kernels run on CPU tensors inside; yields the `Session`."""
    session, kernels = Session(capability), []
    empty, empty_like = torch.empty, torch.empty_like
    old = triton.runtime.driver._active
    triton.runtime.driver.set_active(Driver(capability))

    def handles(kernel):
        kernel._run = partial(session.launch, kernel)
        kernels.append(kernel)

    # no machine code is made, so nothing of this may land in Triton's own cache
    cache = Path(tempfile.gettempdir()) / f"qmoe-ptx-{os.getuid()}"
    with (
        triton.knobs.cache.scope(),
        mock.patch.object(CUDABackend, "make_cubin", return_value=b"not assembled"),
        forced(plan or plan_for(capability)),
        mock.patch.object(CompiledKernel, "_init_handles", handles),
        mock.patch.object(torch, "empty", lambda *a, **k: session.mark(empty(*a, **k))),
        mock.patch.object(torch, "empty_like", lambda *a, **k: session.mark(empty_like(*a, **k))),
    ):
        triton.knobs.cache.dir = str(cache)
        try:
            yield session
        finally:
            triton.runtime.driver._active = old
            for kernel in kernels:
                kernel._run = None
