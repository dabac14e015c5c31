"""Ahead-of-time compilation without a GPU, and counting of machine instructions in what comes out.

Works in a process that does not interpret kernels (TRITON_INTERPRET unset).
"""

import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

# instructions of the integer/logic pipe, which takes a warp instruction every two cycles per
# scheduler; MOV-like ones go either way
ALU = frozenset(
    [
        "LEA",
        "LOP3",
        "SHF",
        "ISETP",
        "SEL",
        "VIMNMX",
        "IMNMX",
        "VIADD",
        "IADD3",
        "IADD",
        "PRMT",
        "SGXT",
        "FSEL",
        "FSETP",
        "FMNMX",
        "I2FP",
        "VIADDMNMX",
        "PLOP3",
        "LOP",
        "IADD32I",
    ]
)
ROUND = frozenset(
    {"depth", "size", "stored", "width"}
)  # integers that are always multiples of 16, which a launch would tell the compiler


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one target.

    Attributes:
        registers: per thread; 0 if unknown (AMD).
        spills: bytes of local memory per thread.
        loop: opcode counts of the innermost loop; empty if not disassembled.
        code: instructions of the whole kernel.
        listing: its disassembly; empty for AMD.
        shared: bytes of shared memory of a program.
    """

    registers: int
    spills: int
    loop: Mapping[str, int]
    code: int
    listing: str = ""
    shared: int = 0

    @property
    def instructions(self) -> int:
        """Instructions of the innermost loop."""
        return sum(self.loop.values())

    @property
    def alu(self) -> int:
        """Those of them on the half-rate integer pipe."""
        return sum(n for op, n in self.loop.items() if op in ALU)


def compile_for(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    target: int | str,
    **options: int,
) -> Compiled:
    """Compiles `kernel` for a CUDA capability (80, 90, ...) or an AMD architecture ("gfx942").

    Args:
        kernel: a `triton.jit` or `gluon.jit` function.
        types: type of each run-time argument, e.g. "*bf16"; unnamed ones are "i32". Pointers are
            taken as 16-byte aligned.
        constants: values of the constexpr arguments.
        options: num_warps and the like.
    """
    names = kernel.arg_names
    options = {"enable_fp_fusion": True} | options
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n].startswith("*") or n in ROUND
    }
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    source = kind(kernel, signature=signature, constexprs=dict(constants), attrs=aligned)
    if isinstance(target, str):
        out = triton.compile(source, target=GPUTarget("hip", target, 64), options=options)
        return replace(_amd(out.asm["amdgcn"]), shared=out.metadata.shared)
    out = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return replace(_cuda(out.asm["cubin"]), shared=out.metadata.shared)


def tool(name: str) -> Path:
    """A disassembler of the CUDA toolkit that Triton's package ships."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _cuda(cubin: bytes) -> Compiled:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run(
            [tool("cuobjdump"), "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
        listing = subprocess.run(
            [tool("nvdisasm"), "-c", path], capture_output=True, text=True, check=True
        ).stdout
    registers = max(map(int, re.findall(r"REG:(\d+)", usage)))
    local = sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))
    code = len(re.findall(r"/\*[0-9a-f]{4,}\*/", listing))
    return Compiled(registers, local, inner_loop(listing), code, listing)


def inner_loop(listing: str) -> Counter[str]:
    """Opcode counts of the largest loop that has no loop inside, of a `nvdisasm -c` listing."""
    found = [re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", x) for x in loop_lines(listing)[0]]
    return Counter(m[1] for m in found if m)


def loop_lines(listing: str) -> tuple[list[str], int, int]:
    """The lines of the largest loop that has no loop inside, and the numbers of instructions in
    front of it and behind it, up to the first exit.
    """
    labels: dict[str, int] = {}
    lines = listing.splitlines()
    best, last_end = (0, -1), -1

    def code(begin: int, end: int) -> list[str]:
        return [x for x in lines[begin:end] if re.search(r"/\*[0-9a-f]{4,}\*/", x)]

    for i, line in enumerate(lines):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = i
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if not jump or jump[1] not in labels or labels[jump[1]] <= last_end:
            continue
        if len(code(labels[jump[1]], i + 1)) == 1:  # the trap behind the code
            continue
        last_end = i
        if i - labels[jump[1]] > best[1] - best[0]:
            best = labels[jump[1]], i
    begin, end = best
    if end < 0:
        return [], len(code(0, len(lines))), 0
    behind = code(end + 1, len(lines))
    leaves = next((i for i, x in enumerate(behind) if re.search(r"\bEXIT\b", x)), 0)
    return code(begin, end + 1), len(code(0, begin)), leaves + 1


def _amd(listing: str) -> Compiled:
    registers = max(map(int, re.findall(r"\.vgpr_count:\s+(\d+)", listing)), default=0)
    spills = sum(map(int, re.findall(r"\.vgpr_spill_count:\s+(\d+)", listing)))
    return Compiled(registers, spills, {}, len(re.findall(r"^\s+[vs]_\w+", listing, re.M)))
