# ruff: noqa: ANN001, ANN201 -- arguments of device code have no Python types
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
"""Decode to integers: a warp writes the codes of 32 stream segments into a zeroed scratch. Device
code; twin `decode_torch`.

Replaces `for r, c in nonzeros(expert): out[r, p, position(c) - 1] = code`; out is [slots, rows, P,
depth] in the order of the coded
columns, bf16, float32 or int8: codes up to +-128 are exact in all of them. A weight may be the sum
of several symbols (the later ones advance by 0); the lane keeps the sum in a register and stores it
again, so nothing is read back. A weight that a cut goes through belongs to the segment in which it
begins: that lane follows it for up to `over` groups more, and the next lane starts writing behind
it. Writes are masked to 0 <= position < depth and to the lane's own row.
"""

import triton
import triton.language as tl

from qmoe.kernels.device import (
    begin,
    groups_of,
    latch,
    refill,
    symbol,
    window_of,
)


@triton.jit(do_not_specialize=["first"])
def zero_active(out, counts, first, experts, size, BLOCK: tl.constexpr):
    """Zeros of the scratch of the experts that have tokens; grid (blocks of `size` = elements per
    expert, slots).
    """
    slot = tl.program_id(1)
    e = first + slot
    if e >= experts:
        return
    if tl.load(counts + e) > 0:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        zeros = tl.zeros([BLOCK], tl.float32).to(out.dtype.element_ty)
        tl.store(out + slot.to(tl.int64) * size + i, zeros, mask=i < size)


@triton.jit
def count_of(counts, expert_info, e, experts, L: tl.constexpr):
    """Tokens of expert e; 0 if there is none, or its codes are not of L bits."""
    inside = e < experts
    limit = tl.load(expert_info + e * 4, mask=inside, other=0)
    count = tl.load(counts + e, mask=inside, other=0)
    return tl.where(limit == L, count, 0)


@triton.jit(do_not_specialize=["first", "experts", "rows", "tiles", "over"])
def decode_active(
    words, records, lanes, row_classes, cuts, starts, classes, context_maps, expert_info, lut,
    row_scale, row_scale_neg, out, counts, first, experts, rows, stored, depth, tiles, over,
    entry_bytes, word_bytes,
    L: tl.constexpr, S: tl.constexpr, WIDE: tl.constexpr, NEG: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One warp: 32 segments of one piece of expert first + slot, if it has tokens; grid (NP,
    slots).

    NEG: negative codes are multiplied by row_scale_neg / row_scale, so that row_scale alone is left
        to be applied.
    """
    lane = tl.arange(0, 32)
    program = tl.program_id(0)
    e = first + tl.program_id(1)
    if count_of(counts, expert_info, e, experts, L) == 0:
        return
    tile, s = program % tiles, program // tiles % S
    piece = program // tiles // S
    pieces = tl.num_programs(0) // tiles // S
    of_piece = e * pieces + piece
    cut = (of_piece * (S - 1) + tl.maximum(s - 1, 0)) * tiles
    limit = tl.load(expert_info + e * 4 + 3)
    row, row_class, next_word, end, low, high, ahead, used, pos = begin(
        lane, tl.zeros([32], tl.int32), of_piece * tiles, cut, tile, s, limit,
        words, records, lanes, row_classes, cuts, starts, word_bytes, S, ASM,
    )  # fmt: skip
    steps = groups_of(records, of_piece * tiles, tile, s, S)
    context_map = context_maps + tl.load(expert_info + e * 4 + 1) + row_class
    lut += tl.multiple_of(tl.load(expert_info + e * 4 + 2), 128)
    classes += (e.to(tl.int64) * pieces + piece) * stored
    out += ((tl.program_id(1).to(tl.int64) * rows + row) * pieces + piece) * depth - 1
    ratio = tl.full([32], 1.0 / 64, tl.float32)
    if NEG:
        at_row = e.to(tl.int64) * rows + row
        ratio *= tl.load(row_scale_neg + at_row, mask=row < rows, other=1.0).to(tl.float32)
        ratio /= tl.load(row_scale + at_row, mask=row < rows, other=1.0).to(tl.float32)
    # position of the last real column; lanes that are done are beyond it
    last = tl.minimum(limit - 1, depth) + tl.zeros([32], tl.int32)
    before = pos
    total = tl.zeros([32], tl.float32)
    for i in range(steps + over):
        table = latch(lut, classes, context_map, pos, entry_bytes, word_bytes, L, ASM, False)
        for _u in tl.static_range(32 // L):
            window = window_of(low, high, used)
            advance, value, length = symbol(lut, table, window, entry_bytes, L, WIDE, ASM, False)
            used += length
            pos += advance
            total = tl.where(advance == 0, total + value, value)
            write = (value != 0) & (pos > before) & (pos <= last) & (row < rows)
            code = total * tl.where(total < 0, ratio, 1.0 / 64)
            tl.store(out + pos, code.to(out.dtype.element_ty), mask=write)
        pos = tl.minimum(pos, limit)
        if S > 1:
            last = tl.where(i == steps - 1, tl.minimum(last, pos), last)
        next_word, low, high, ahead, used = refill(
            words, next_word, end, low, high, ahead, used, word_bytes, ASM
        )
