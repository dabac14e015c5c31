# ruff: noqa: ANN001, ANN201 -- arguments of device code have no Python types
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
"""The loop of `qmoe.kernels.matvec` with lookup tables and inputs in shared memory, in Gluon: what
runs on NVIDIA GPUs.

Lookups are the loop's most scattered loads: lanes that follow rows of different classes use several
tables of four cache lines each. Shared memory serves any 32 addresses in as many cycles as the
fullest of its 32 banks has words. The warps of a program share one copy of the tables and of the
piece's inputs, which for one token they build themselves (FAN): one launch less. The rest of the
loop is the same code, and so are its results, bit for bit.

Needs codes of at most 8 bits (usually there are 7, then 16 tables are 4 KiB) and 16-bit entries,
and a Triton whose shared memory can gather. Gluon is experimental: where it is missing or has
changed, `SUPPORTED` is false and the plain loop runs. Triton's interpreter does not run it;
tests/ptx does.
"""

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qmoe.kernels.interleave import BLOCK_TILES
from qmoe.kernels.matvec import COUNTS, active_expert, follow, inputs_of, start

LIMIT = 8  # bits of the longest codes that fit
MAX_WARPS = BLOCK_TILES  # of a program
MAX_ROOM = 4096  # inputs; a piece of 1024 columns needs 1280

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl

    SUPPORTED = hasattr(gl, "barrier") and all(
        hasattr(gl.shared_memory_descriptor, name) for name in ("gather", "scatter")
    )
except (ImportError, AttributeError):  # no Gluon, or one of another shape
    SUPPORTED = False


def fits(limit: int, wide: bool) -> bool:
    """Whether this kernel runs codes of `limit` bits with 16 or 32-bit (`wide`) entries."""
    return SUPPORTED and limit <= LIMIT and not wide


def room(width: int, batch: int) -> int:
    """Inputs that are kept in shared memory for `batch` tokens: a power of two >= width, or 0 to
    read them through the cache.
    """
    size: int = triton.next_power_of_2(max(width, 64 * MAX_WARPS))
    return size if batch == 1 and size <= MAX_ROOM else 0


def fill(width: int, warps: int) -> int:
    """Of that room, what the copies of `warps` warps fill: a multiple of 64 each."""
    return -(-width // (64 * warps)) * 64 * warps


def jit(function: Any) -> Any:
    """Gluon's jit where there is one, else nothing."""
    return gluon.jit(function, do_not_specialize=COUNTS) if SUPPORTED else None


@jit
def build(i, x, columns, scales, e, cols, stored, S: tl.constexpr, X_BITS: tl.constexpr):
    """Inputs i of this program's piece as words of X_BITS, from the layer's input at x."""
    piece = (e.to(tl.int64) * (tl.num_programs(1) // S) + tl.program_id(1) // S) * stored
    column = gl.load(columns + tl.multiple_of(piece, 16) + i, mask=i < stored, other=-1)
    scale = gl.load(scales + tl.multiple_of(piece, 16) + i, mask=i < stored, other=0.0).to(
        gl.float32
    )
    column = column.to(gl.int32)
    use = column.to(gl.uint32, bitcast=True) < cols  # no column is -1
    v = gl.load(x + column, mask=use, other=0.0).to(gl.float32) * scale
    if X_BITS == 16:
        return v.to(gl.bfloat16).to(gl.int16, bitcast=True)
    else:
        return v.to(gl.int32, bitcast=True)


@jit
def matvec_shared(
    words, records, lanes, row_classes, cuts, starts, classes, context_maps, expert_info, lut,
    row_scale, row_scale_neg,
    xs, group_expert, partial, columns, scales,
    experts, rows, stored, width, tiles, entry_bytes, x_bytes, word_bytes, cols,
    B: tl.constexpr, X_BITS: tl.constexpr, L: tl.constexpr, S: tl.constexpr, W: tl.constexpr,
    WIDE: tl.constexpr, NEG: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
    ROOM: tl.constexpr, FILL: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    """`matvec` for L <= LIMIT and 16-bit entries, on its grid; ROOM from `room`, of which
    the first FILL are filled. FAN > 0: `xs` is the layer's input [tokens, cols], and pair g takes
    row g // FAN of it.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [W], [0])
    copy: gl.constexpr = gl.BlockedLayout([8], [32], [W], [0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    e = active_expert(group_expert, expert_info, experts, L)
    if e < 0:
        if PDL:
            gdc_wait()
        return
    lane = gl.arange(0, 32 * W, layout=layout)
    zero = gl.zeros([32 * W], gl.int32, layout=layout)
    # all loads that depend on nothing but the expert, before anything waits
    state = start(
        lane, zero, e, expert_info, words, records, lanes, row_classes, cuts, starts, tiles,
        word_bytes, S, W, ASM,
    )  # fmt: skip
    first = lut + tl.multiple_of(gl.load(expert_info + e * 4 + 2), 128)
    entries = gl.load(first + gl.arange(0, 16 << L, layout=copy))
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tables = gl.allocate_shared_memory(gl.int16, [16 << L], flat)
    inputs = tables
    if ROOM > 0:
        WORD: gl.constexpr = gl.int16 if X_BITS == 16 else gl.int32
        PART: gl.constexpr = 64 * W
        part: gl.constexpr = gl.BlockedLayout([2], [32], [W], [0])
        inputs = gl.allocate_shared_memory(WORD, [ROOM], flat)
        if FAN > 0:
            x = xs + (gl.program_id(0) // FAN).to(gl.int64) * cols
        else:
            x = inputs_of(xs, width, B, S).to(gl.pointer_type(WORD))
        for k in gl.static_range(FILL // PART):
            i = k * PART + gl.arange(0, PART, layout=part)
            if FAN > 0:
                values = build(i, x, columns, scales, e, cols, stored, S, X_BITS)
            else:
                values = gl.load(x + i, mask=i < width, other=0)
            inputs.slice(k * PART, PART).store(values)
    tables.store(entries)
    gl.barrier()
    follow(
        lane, gl.zeros([32 * W], gl.float32, layout=layout), e, state, lut, tables, inputs,
        words, classes, context_maps, expert_info, row_scale, row_scale_neg, xs, partial,
        rows, stored, width, tiles, entry_bytes, x_bytes, word_bytes,
        B, X_BITS, L, S, W, WIDE, NEG, ASM, True, ROOM > 0,
    )  # fmt: skip
