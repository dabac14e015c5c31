# ruff: noqa: ANN001, ANN201 -- arguments of device code have no Python types
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
"""The loop of `qmoe.kernels.matvec` with the lookup tables in shared memory, in Gluon.

Lookups are the loop's most scattered loads: lanes that follow rows of different classes use several
tables of four cache lines each. Shared memory serves any 32 addresses in as many cycles as the
fullest of its 32 banks has words. The rest of the loop is the same code.

Needs codes of at most 8 bits and 16-bit entries (16 tables are 8 KiB), and a Triton whose shared
memory can gather. Triton's interpreter does not run Gluon, so this kernel is compiled in the tests
and checked by `scripts/bench_gpu` only.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qmoe.kernels.matvec import follow

LIMIT = 8  # bits of the only codes that fit
SUPPORTED = hasattr(gl.shared_memory_descriptor, "gather") and hasattr(gl, "barrier")


@gluon.jit
def matvec_shared(
    words, records, lanes, starts, classes, context_maps, expert_maps, expert_limits, lut,
    row_scale, row_scale_neg,
    xs, group_expert, partial,
    experts, rows, stored, width, tiles, entry_bytes, x_bytes, map_stride,
    B: tl.constexpr, X_BITS: tl.constexpr, L: tl.constexpr, S: tl.constexpr,
    WIDE: tl.constexpr, NEG: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """`matvec` for L = 8 and 16-bit entries; the same arguments and grid."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    copy: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    e = gl.load(group_expert + gl.program_id(1))
    if (e < 0) | (e >= experts):
        return
    if gl.load(expert_limits + e) != L:
        return
    first = gl.load(context_maps + gl.load(expert_maps + e) * map_stride)
    tables = gl.allocate_shared_memory(gl.int16, [4096], flat)
    tables.store(gl.load(lut + first + gl.arange(0, 4096, layout=copy)))
    gl.barrier()
    follow(
        gl.arange(0, 32, layout=layout),
        gl.zeros([32], gl.int32, layout=layout),
        gl.zeros([32], gl.float32, layout=layout),
        e, first, tables,
        words, records, lanes, starts, classes, context_maps, expert_maps,
        row_scale, row_scale_neg, xs, partial,
        rows, stored, width, tiles, entry_bytes, x_bytes, map_stride,
        B, X_BITS, L, S, WIDE, NEG, ASM, True,
    )  # fmt: skip
