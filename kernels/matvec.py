# ruff: noqa: ANN001, ANN201 -- arguments of device code have no Python types
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
"""Decode inside the product: 1 to 8 tokens per expert, one launch for all (token, expert) pairs of
a layer. Device code.

Replaces

    for g in groups:                                  # a group = up to B pairs of one expert
        for b in pairs(g):
            y[g, :, b] = W[expert(g)] @ x[token(b)]   # W = codes * col_scale * row_scale

by `qmoe.kernels.inputs` (puts x, times the column scales, into the order of the coded columns),
`matvec` (every lane follows one stream segment and stores its partial sum) and
`qmoe.kernels.sums` (adds the partial sums in a fixed order).
No atomics: equal inputs give equal bits, and the result of a pair does not depend on the other
pairs.

Shapes, with E experts, P pieces, S segments, NP = P * S * ceil(rows / 32) programs per expert:
- group_expert int32 or int64 [groups], outside 0..E-1 for an empty group; with one pair a group it
  is the index of experts itself;
- xs [groups, P, width, B] float32 or bf16: position p of a piece at index p + 1, zeros elsewhere;
- partial float32 [groups, P * S, B, rows].
Launchers and twins are in `qmoe.kernels.project`.

A kernel launched with PDL may begin before the one in front of it has ended: what that one writes
is read behind `gdc_wait` only, nothing is written in front of it, no program leaves without it, and
`gdc_launch_dependents` stands behind it, so that whatever is older is complete when a kernel
begins.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qmoe.kernels.device import (
    begin,
    expert_of,
    gather,
    groups_of,
    latch,
    refill,
    shared_word,
    symbol,
    window_of,
)

COUNTS = ("experts", "rows", "tiles", "cols")  # nothing is gained by a kernel for each kind of them


@triton.jit
def half(word, index: tl.constexpr, BITS: tl.constexpr):
    """Element `index` of a packed word as float32: BITS = 16 is bf16, 32 is float32."""
    if BITS == 32:
        return (word >> (32 * index)).to(tl.uint32).to(tl.float32, bitcast=True)
    else:
        return (((word >> (16 * index)).to(tl.uint32) & 0xFFFF) << 16).to(tl.float32, bitcast=True)


@triton.jit
def active_expert(group_expert, expert_info, experts, L: tl.constexpr):
    """The expert of this program's group, -1 if there is none or its codes are not of L bits."""
    e = expert_of(group_expert, tl.program_id(0), experts)
    limit = tl.load(expert_info + tl.maximum(e, 0) * 4)
    return tl.where(limit == L, e, -1)


@triton.jit
def start(
    lane, zero, e, expert_info, words, records, lanes, row_classes, cuts, starts, tiles, word_bytes,
    S: tl.constexpr, W: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """`begin` for this program: W neighbouring tiles, one for each of its warps; behind it the
    groups, which no tile has more of, and the limit. A warp behind the last tile repeats it. The
    tiles with the longest streams come first in the grid.
    """
    slot, tile0 = tl.program_id(1), tl.program_id(2) * W
    # every tile has words and every cut has starts, less than 2^31: indices fit in int32
    of_piece = e * (tl.num_programs(1) // S) + slot // S
    s = slot % S
    piece = of_piece * tiles
    cut = (of_piece * (S - 1) + tl.maximum(s - 1, 0)) * tiles
    tile = tl.minimum(tile0 + lane // 32, tiles - 1)
    limit = tl.load(expert_info + e * 4 + 3)
    row, row_class, next_word, end, low, high, ahead, used, pos = begin(
        lane, zero, piece, cut, tile, s, limit,
        words, records, lanes, row_classes, cuts, starts, word_bytes, S, ASM,
    )  # fmt: skip
    steps = groups_of(records, piece, tile0, s, S)
    return row, row_class, next_word, end, low, high, ahead, used, pos, steps, limit


@triton.jit
def inputs_of(xs, width, B: tl.constexpr, S: tl.constexpr):
    """The inputs of this program's group and piece: pointer to [width, B]."""
    row = tl.program_id(0).to(tl.int64) * (tl.num_programs(1) // S) + tl.program_id(1) // S
    return xs + tl.multiple_of(row * width * B, 16)


@triton.jit
def follow(
    lane, nothing, e, lane_state, lut, tables, inputs,
    words, classes, context_maps, expert_info, row_scale, row_scale_neg, xs, partial,
    rows, stored, width, tiles, entry_bytes, x_bytes, word_bytes,
    B: tl.constexpr, X_BITS: tl.constexpr, L: tl.constexpr, S: tl.constexpr, W: tl.constexpr,
    WIDE: tl.constexpr, NEG: tl.constexpr, ASM: tl.constexpr,
    SHARED: tl.constexpr, SHARED_X: tl.constexpr,
):  # fmt: skip
    """The loop of one program of `matvec`: expert e, already checked; `lane_state` from `start`.

    `nothing` are float zeros [32 * W]. `tables` holds the lookup tables if SHARED, `inputs` the
    inputs of the piece if SHARED_X (a word of X_BITS each), in shared memory; `lut` points at the
    expert's tables otherwise, and `xs` at all inputs.
    """
    row, row_class, next_word, end, low, high, ahead, used, pos, steps, limit = lane_state
    slot = tl.program_id(1)
    slots = tl.num_programs(1)
    # zero that only the host knows of: pointers of each lane's own stay in registers, where uniform
    # ones are put together again in every turn
    own = (row >> 31).to(tl.int64)
    words += own
    context_map = context_maps + tl.load(expert_info + e * 4 + 1) + row_class
    classes += (e.to(tl.int64) * (slots // S) + slot // S) * stored + own
    PER: tl.constexpr = 64 // X_BITS if B * X_BITS > 64 else B  # inputs per load
    LOADS: tl.constexpr = B // PER
    WORD: tl.constexpr = (
        tl.uint64 if PER * X_BITS == 64 else (tl.uint32 if PER * X_BITS == 32 else tl.uint16)
    )
    if not SHARED_X:
        xs = inputs_of(xs, width, B, S)
    # a warp behind the last tile stores nothing
    inside = (tl.program_id(2) * W + lane // 32 < tiles) & (row < rows)
    at_row = e.to(tl.int64) * rows + row
    if NEG:
        positive = tl.load(row_scale + at_row, mask=inside, other=0.0).to(tl.float32)
        negative = tl.load(row_scale_neg + at_row, mask=inside, other=0.0).to(tl.float32)
    acc0 = nothing
    acc1 = nothing
    acc2 = nothing
    acc3 = nothing
    acc4 = nothing
    acc5 = nothing
    acc6 = nothing
    acc7 = nothing
    for _ in range(steps):
        table = latch(lut, classes, context_map, pos, entry_bytes, word_bytes, L, ASM, SHARED)
        for _u in tl.static_range(32 // L):
            window = window_of(low, high, used)
            advance, value, length = symbol(
                tables, table, window, entry_bytes, L, WIDE, ASM, SHARED
            )
            used += length
            pos += advance
            if NEG:
                value = value * tl.where(value < 0, negative, positive)
            for j in tl.static_range(LOADS):
                if SHARED_X:
                    w = shared_word(inputs, pos)
                else:
                    w = gather(xs, pos * LOADS + j, x_bytes, WORD, ASM)
                if j == 0:
                    acc0 += value * half(w, 0, X_BITS)
                    if PER > 1:
                        acc1 += value * half(w, 1, X_BITS)
                    if PER > 2:
                        acc2 += value * half(w, 2, X_BITS)
                        acc3 += value * half(w, 3, X_BITS)
                elif PER == 4:
                    acc4 += value * half(w, 0, X_BITS)
                    acc5 += value * half(w, 1, X_BITS)
                    acc6 += value * half(w, 2, X_BITS)
                    acc7 += value * half(w, 3, X_BITS)
                elif j == 1:
                    acc2 += value * half(w, 0, X_BITS)
                    acc3 += value * half(w, 1, X_BITS)
                elif j == 2:
                    acc4 += value * half(w, 0, X_BITS)
                    acc5 += value * half(w, 1, X_BITS)
                else:
                    acc6 += value * half(w, 0, X_BITS)
                    acc7 += value * half(w, 1, X_BITS)
        pos = tl.minimum(pos, limit)
        next_word, low, high, ahead, used = refill(
            words, next_word, end, low, high, ahead, used, word_bytes, ASM
        )
    to = partial + ((tl.program_id(0).to(tl.int64) * slots + slot) * B) * rows + row
    scale = nothing + 1.0 / 64
    if not NEG:
        scale *= tl.load(row_scale + at_row, mask=inside, other=0.0).to(tl.float32)
    tl.store(to, acc0 * scale, mask=inside)
    if B > 1:
        tl.store(to + rows, acc1 * scale, mask=inside)
    if B > 2:
        tl.store(to + 2 * rows, acc2 * scale, mask=inside)
        tl.store(to + 3 * rows, acc3 * scale, mask=inside)
    if B > 4:
        tl.store(to + 4 * rows, acc4 * scale, mask=inside)
        tl.store(to + 5 * rows, acc5 * scale, mask=inside)
        tl.store(to + 6 * rows, acc6 * scale, mask=inside)
        tl.store(to + 7 * rows, acc7 * scale, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def matvec(
    words, records, lanes, row_classes, cuts, starts, classes, context_maps, expert_info, lut,
    row_scale, row_scale_neg,
    xs, group_expert, partial,
    experts, rows, stored, width, tiles, entry_bytes, x_bytes, word_bytes,
    B: tl.constexpr, X_BITS: tl.constexpr, L: tl.constexpr, S: tl.constexpr, W: tl.constexpr,
    WIDE: tl.constexpr, NEG: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """W warps: a segment of W tiles of one piece of one expert against B inputs; grid (groups, P *
    S, ceil(tiles / W)).

    `entry_bytes`, `x_bytes` and `word_bytes` = 4 are the sizes of a lookup entry, of one x load and
    of an int32, passed at run time (see `device.address`).
    """
    e = active_expert(group_expert, expert_info, experts, L)
    if e < 0:
        if PDL:
            gdc_wait()
        return
    LANES: tl.constexpr = 32 * W
    lane = tl.arange(0, LANES)
    zero = tl.zeros([LANES], tl.int32)
    state = start(
        lane, zero, e, expert_info, words, records, lanes, row_classes, cuts, starts, tiles,
        word_bytes, S, W, ASM,
    )  # fmt: skip
    tables = lut + tl.multiple_of(tl.load(expert_info + e * 4 + 2), 128)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    follow(
        lane, tl.zeros([LANES], tl.float32), e, state, tables, tables, xs,
        words, classes, context_maps, expert_info, row_scale, row_scale_neg, xs, partial,
        rows, stored, width, tiles, entry_bytes, x_bytes, word_bytes,
        B, X_BITS, L, S, W, WIDE, NEG, ASM, False, False,
    )  # fmt: skip
