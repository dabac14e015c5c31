# ruff: noqa: ANN001, ANN201 -- arguments of device code have no Python types
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
"""The loop of `qmoe.kernels.matvec` with lookup tables and inputs in shared memory, in Gluon: what
runs on NVIDIA GPUs.

Lookups are the loop's most scattered loads: lanes that follow rows of different classes use several
tables of four cache lines each. Shared memory serves any 32 addresses in as many cycles as the
fullest of its 32 banks has words. The warps of a program share one copy of the tables and of the
piece's inputs. The rest of the loop is the same code, and so are its results, bit for bit.

Needs codes of at most 8 bits (usually there are 7, then 16 tables are 4 KiB) and 16-bit entries,
and a Triton whose shared memory can gather. Triton's interpreter does not run Gluon, so this kernel
is compiled in the tests and checked by `scripts/bench_gpu` only; `follow` is interpreted as part of
the plain loop.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qmoe.kernels.device import tables_of
from qmoe.kernels.matvec import active_expert, follow, inputs_of, place

LIMIT = 8  # bits of the longest codes that fit
SUPPORTED = hasattr(gl.shared_memory_descriptor, "gather") and hasattr(gl, "barrier")
MAX_ROOM = 4096  # inputs; a piece of 1024 columns needs 1280


def fits(limit: int, wide: bool) -> bool:
    """Whether this kernel runs codes of `limit` bits with 16 or 32-bit (`wide`) entries."""
    return SUPPORTED and limit <= LIMIT and not wide


def room(width: int, batch: int, bits: int) -> int:
    """Inputs of `bits` that are kept in shared memory for `batch` tokens: a power of two >= width,
    or 0 to read them through the cache.
    """
    size: int = triton.next_power_of_2(width)
    return size if batch == 1 and bits == 16 and size <= MAX_ROOM else 0


@gluon.jit
def matvec_shared(
    words, records, lanes, starts, classes, context_maps, expert_maps, expert_limits, lut,
    row_scale, row_scale_neg,
    xs, group_expert, partial,
    experts, rows, stored, width, tiles, entry_bytes, x_bytes, word_bytes, map_stride,
    B: tl.constexpr, X_BITS: tl.constexpr, L: tl.constexpr, S: tl.constexpr, W: tl.constexpr,
    WIDE: tl.constexpr, NEG: tl.constexpr, ASM: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """`matvec` for L <= LIMIT and 16-bit entries; the same arguments and grid, ROOM from `room`."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [W], [0])
    copy: gl.constexpr = gl.BlockedLayout([8], [32], [W], [0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    e = active_expert(group_expert, expert_limits, experts, L)
    if e < 0:
        return
    start = tables_of(lut, context_maps, expert_maps, e, map_stride)
    tables = gl.allocate_shared_memory(gl.int16, [16 << L], flat)
    tables.store(gl.load(start + gl.arange(0, 16 << L, layout=copy)))
    inputs = tables
    if ROOM > 0:
        slot, slots, _tile = place(tiles, W, S)
        x = inputs_of(xs, slot, slots, width, B, S).to(gl.pointer_type(gl.int16))
        i = gl.arange(0, ROOM, layout=copy)
        inputs = gl.allocate_shared_memory(gl.int16, [ROOM], flat)
        inputs.store(gl.load(x + i, mask=i < width // 8 * 8, other=0))  # a multiple of 8 anyway
    gl.barrier()
    follow(
        gl.arange(0, 32 * W, layout=layout),
        gl.zeros([32 * W], gl.int32, layout=layout),
        gl.zeros([32 * W], gl.float32, layout=layout),
        e, lut, tables, inputs,
        words, records, lanes, starts, classes, context_maps, expert_maps,
        row_scale, row_scale_neg, xs, partial,
        rows, stored, width, tiles, entry_bytes, x_bytes, word_bytes, map_stride,
        B, X_BITS, L, S, W, WIDE, NEG, ASM, True, ROOM > 0,
    )  # fmt: skip
