# ruff: noqa: ANN001, ANN201 -- arguments of device code have no Python types
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
"""Decode inside the product: 1 to 8 tokens per expert, one launch for all (token, expert) pairs of
a layer. Device code.

Replaces

    for g in groups:                                  # a group = up to B pairs of one expert
        for b in pairs(g):
            y[g, :, b] = W[expert(g)] @ x[token(b)]   # W = codes * col_scale * row_scale

by `gather_inputs` (puts x, times the column scales, into the order of the coded columns), `matvec`
(every lane follows one stream segment and stores its partial sum) and `sum_partials` or
`silu_inputs` or `sum_tokens` (add the partial sums in a fixed order).
No atomics: equal inputs give equal bits, and the result of a pair does not depend on the other
pairs.

Shapes, with E experts, P pieces, S segments, NP = P * S * ceil(rows / 32) programs per expert:
- group_expert int32 [groups], outside 0..E-1 for an empty group; group_pairs int32 [groups, B], -1
  for an empty place;
- slots int32 [pairs]: g * B + b of the pair, -1 if its expert is outside 0..E-1;
- xs [groups, P, width, B] float32 or bf16: position p of a piece at index p + 1, zeros elsewhere;
- partial float32 [groups, P * S, B, rows].
Launchers and twins are in `qmoe.kernels.project`.
"""

import triton
import triton.language as tl

from qmoe.kernels.device import (
    gather,
    latch,
    refill,
    shared_word,
    symbol,
    tables_of,
    window_of,
)


@triton.jit
def gather_inputs(
    x, group_expert, group_pairs, columns, scales, xs, experts, cols, fan, stored, out_width,
    B: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """xs[g, p, i, b] = x[pair(g, b) // fan, columns[e, p, i + OFFSET]] * scales[...]; grid (blocks
    of out_width, P, groups).
    """
    g = tl.program_id(2).to(tl.int64)
    piece = tl.program_id(1)
    pieces = tl.num_programs(1)
    e = tl.load(group_expert + g)
    valid = (e >= 0) & (e < experts)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = (tl.where(valid, e, 0).to(tl.int64) * pieces + piece) * stored + i + OFFSET
    inside = (i + OFFSET < tl.where(valid, stored, 0)) & (i < out_width)
    column = tl.load(columns + at, mask=inside, other=-1).to(tl.int32)
    scale = tl.load(scales + at, mask=inside, other=0.0)
    to = ((g * pieces + piece) * out_width + i) * B
    for b in tl.static_range(B):
        pair = tl.load(group_pairs + g * B + b)
        use = (column >= 0) & (column < tl.where(pair >= 0, cols, 0))
        token = (tl.maximum(pair, 0) // fan).to(tl.int64)
        v = tl.load(x + token * cols + column, mask=use, other=0.0).to(tl.float32) * scale
        if xs.dtype.element_ty == tl.bfloat16:
            v = rounded(v, 1)
        tl.store(xs + to + b, v.to(xs.dtype.element_ty), mask=i < out_width)


@triton.jit
def half(word, index: tl.constexpr, BITS: tl.constexpr):
    """Element `index` of a packed word as float32: BITS = 16 is bf16, 32 is float32."""
    if BITS == 32:
        return (word >> (32 * index)).to(tl.uint32).to(tl.float32, bitcast=True)
    else:
        return (((word >> (16 * index)).to(tl.uint32) & 0xFFFF) << 16).to(tl.float32, bitcast=True)


@triton.jit
def active_expert(group_expert, expert_limits, experts, L: tl.constexpr):
    """The expert of this program's group, -1 if there is none or its codes are not of L bits."""
    e = tl.load(group_expert + tl.program_id(1))
    valid = (e >= 0) & (e < experts)
    limit = tl.load(expert_limits + tl.where(valid, e, 0))
    return tl.where(valid & (limit == L), e, -1)


@triton.jit
def place(tiles, W: tl.constexpr, S: tl.constexpr):
    """What this program works on: (slot = piece * S + segment, number of slots, first tile).

    A program takes W neighbouring tiles of 32 segments, one for each of its warps.
    """
    per_slot = (tiles + W - 1) // W
    program = tl.program_id(0)
    return program // per_slot, tl.num_programs(0) // per_slot, program % per_slot * W


@triton.jit
def inputs_of(xs, slot, slots, width, B: tl.constexpr, S: tl.constexpr):
    """The inputs of this program's group and piece: pointer to [width, B]."""
    g = tl.program_id(1).to(tl.int64)
    return xs + tl.multiple_of((g * (slots // S) + slot // S) * width * B, 8)


@triton.jit
def follow(
    lane, zero, nothing, e, lut, tables, inputs,
    words, records, lanes, starts, classes, context_maps, expert_maps,
    row_scale, row_scale_neg, xs, partial,
    rows, stored, width, tiles, entry_bytes, x_bytes, word_bytes, map_stride,
    B: tl.constexpr, X_BITS: tl.constexpr, L: tl.constexpr, S: tl.constexpr, W: tl.constexpr,
    WIDE: tl.constexpr, NEG: tl.constexpr, ASM: tl.constexpr,
    SHARED: tl.constexpr, SHARED_X: tl.constexpr,
):  # fmt: skip
    """The work of one program of `matvec`: expert e, already checked.

    `lane`, `zero` and `nothing` are 0..32 * W - 1, integer and float zeros [32 * W]: made by the
    caller, since Gluon gives tensors a layout. `tables` holds the lookup tables if SHARED, `inputs`
    the inputs of the piece if SHARED_X (one bf16 each), in shared memory.
    """
    slot, slots, tile0 = place(tiles, W, S)
    piece = slot // S
    g = tl.program_id(1).to(tl.int64)
    base = (e.to(tl.int64) * slots + slot) * tiles
    tile = tile0 + lane // 32
    here = tile < tiles  # a warp behind the last tile repeats it and stores nothing
    at = base + tl.minimum(tile, tiles - 1)
    first = tl.load(records + at * 4)
    end = tl.load(records + at * 4 + 1)
    limit = tl.load(records + (base + tile0) * 4 + 3)  # the matrix's, equal in all its records
    steps = tl.load(records + (base + tile0) * 4 + 2)
    for k in tl.static_range(1, W):
        other = base + tl.minimum(tile0 + k, tiles - 1)
        steps = tl.maximum(steps, tl.load(records + other * 4 + 2))
    info = tl.load(lanes + at * 32 + lane % 32)
    row = info & 0xFFFFFF
    context_map = context_maps + tl.load(expert_maps + e) * map_stride + (info >> 24)
    if not SHARED:
        lut = tables_of(lut, context_maps, expert_maps, e, map_stride)
    classes += (e.to(tl.int64) * (slots // S) + piece) * stored
    PER: tl.constexpr = 64 // X_BITS if B * X_BITS > 64 else B  # inputs per load
    LOADS: tl.constexpr = B // PER
    WORD: tl.constexpr = (
        tl.uint64 if PER * X_BITS == 64 else (tl.uint32 if PER * X_BITS == 32 else tl.uint16)
    )
    xs = inputs_of(xs, slot, slots, width, B, S)
    inside = here & (row < rows)
    if NEG:
        positive = tl.load(row_scale + e.to(tl.int64) * rows + row, mask=inside, other=0.0)
        negative = tl.load(row_scale_neg + e.to(tl.int64) * rows + row, mask=inside, other=0.0)
    next_word = first + lane % 32
    low = tl.load(words + next_word)
    high = tl.load(words + next_word + 32)
    next_word += 64
    used = zero
    pos = zero
    if S > 1:
        start = tl.load(starts + at * 32 + lane % 32)
        pos = start & 0xFFFF
        left = start >> 16
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
        window = window_of(low, high, used)
        for _u in tl.static_range(32 // L):
            advance, value, length = symbol(
                tables, table, window, entry_bytes, L, WIDE, ASM, SHARED
            )
            window = window >> length
            used += length.to(tl.int32)
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
        if S > 1:
            left -= 1
            pos = tl.where(left > 0, pos, limit)
        next_word, low, high, used = refill(words, next_word, end, low, high, used, word_bytes, ASM)
    to = partial + ((g * slots + slot) * B) * rows + row
    scale = nothing + 1.0 / 64
    if not NEG:
        scale *= tl.load(row_scale + e.to(tl.int64) * rows + row, mask=inside, other=0.0)
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


@triton.jit
def matvec(
    words, records, lanes, starts, classes, context_maps, expert_maps, expert_limits, lut,
    row_scale, row_scale_neg,
    xs, group_expert, partial,
    experts, rows, stored, width, tiles, entry_bytes, x_bytes, word_bytes, map_stride,
    B: tl.constexpr, X_BITS: tl.constexpr, L: tl.constexpr, S: tl.constexpr, W: tl.constexpr,
    WIDE: tl.constexpr, NEG: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """W warps: 32 * W segments of one piece of one expert against B inputs; grid (P * S *
    ceil(tiles / W), groups).

    `entry_bytes`, `x_bytes` and `word_bytes` = 4 are the sizes of a lookup entry, of one x load and
    of an int32, passed at run time (see `device.address`).
    """
    e = active_expert(group_expert, expert_limits, experts, L)
    if e < 0:
        return
    lanes_here: tl.constexpr = 32 * W
    follow(
        tl.arange(0, lanes_here), tl.zeros([lanes_here], tl.int32),
        tl.zeros([lanes_here], tl.float32), e, lut, lut, xs,
        words, records, lanes, starts, classes, context_maps, expert_maps,
        row_scale, row_scale_neg, xs, partial,
        rows, stored, width, tiles, entry_bytes, x_bytes, word_bytes, map_stride,
        B, X_BITS, L, S, W, WIDE, NEG, ASM, False, False,
    )  # fmt: skip


@triton.jit
def slot_sum(partial, slot, element, rows, SLOTS: tl.constexpr, B: tl.constexpr, mask):
    """Sum over the P * S partial sums of a pair at row `element`; slot < 0 gives zeros."""
    at = tl.maximum(slot, 0).to(tl.int64)
    end = tl.where(slot >= 0, rows, 0)
    base = partial + ((at // B) * SLOTS * B + at % B) * rows + element
    total = tl.zeros(element.shape, tl.float32)
    for s in tl.static_range(SLOTS):
        total += tl.load(base + s * B * rows, mask=mask & (element < end), other=0.0)
    return total


@triton.jit
def sum_partials(
    partial, slots, y, rows, SLOTS: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr
):
    """y[pair, r] = sum of the pair's partial sums; grid (blocks of rows, pairs)."""
    pair = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = slot_sum(partial, tl.load(slots + pair), r, rows, SLOTS, B, r < rows)
    if y.dtype.element_ty == tl.bfloat16:
        total = rounded(total, 1)
    tl.store(y + pair * rows + r, total.to(y.dtype.element_ty), mask=r < rows)


@triton.jit
def silu_inputs(
    partial, group_expert, group_pairs, columns, scales, xs, experts, inner, stored, width,
    SLOTS: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The gate between the projections, straight into the down projection's inputs; grid (blocks of
    width, P of down, groups).

    xs[g, p, i, b] = silu(gate) * up * scale at column = columns[e, p, i]: gate = row `column` of
    the first projection's sums, up = row inner + column. HALF rounds gate, up and the product to
    bf16 (1) or fp16 (2) first, as the uncompressed model does; 0 keeps float32.
    """
    g = tl.program_id(2).to(tl.int64)
    pieces = tl.num_programs(1)
    e = tl.load(group_expert + g)
    valid = (e >= 0) & (e < experts)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = (tl.where(valid, e, 0).to(tl.int64) * pieces + tl.program_id(1)) * stored + i
    inside = i < tl.where(valid, stored, 0)
    column = tl.load(columns + at, mask=inside, other=-1).to(tl.int32)
    scale = tl.load(scales + at, mask=inside, other=0.0)
    to = ((g * pieces + tl.program_id(1)) * width + i) * B
    for b in tl.static_range(B):
        pair = tl.load(group_pairs + g * B + b)
        use = (column >= 0) & (column < tl.where(pair >= 0, inner, 0))
        slot = (g * B + b).to(tl.int32)
        gate = slot_sum(partial, slot, tl.maximum(column, 0), 2 * inner, SLOTS, B, use)
        up = slot_sum(partial, slot, tl.maximum(column, 0) + inner, 2 * inner, SLOTS, B, use)
        gate, up = rounded(gate, HALF), rounded(up, HALF)
        v = rounded(rounded(gate / (1.0 + tl.exp(-gate)), HALF) * up, HALF) * scale
        tl.store(xs + to + b, v.to(xs.dtype.element_ty), mask=i < width)


@triton.jit
def rounded(v, HALF: tl.constexpr):
    """float32 rounded to nearest even as bf16 (1) or fp16 (2), or left alone (0); by bits, since
    the interpreter truncates to bf16.
    """
    if HALF == 1:
        bits = v.to(tl.uint32, bitcast=True)
        even = bits + 0x7FFF + ((bits >> 16) & 1)
        return tl.where(v == v, (even & 0xFFFF0000).to(tl.float32, bitcast=True), v)
    elif HALF == 2:
        return v.to(tl.float16).to(tl.float32)
    else:
        return v


@triton.jit
def sum_tokens(
    partial,
    slots,
    weights,
    out,
    rows,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    B: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[n, r] = sum over k of weights[n, k] * y[n * K + k, r], in the order of k; grid (blocks of
    rows, tokens).
    """
    n = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(K):
        slot = tl.load(slots + n * K + k)
        y = slot_sum(partial, slot, r, rows, SLOTS, B, r < rows)
        total += y * tl.load(weights + n * K + k).to(tl.float32)
    if out.dtype.element_ty == tl.bfloat16:
        total = rounded(total, 1)
    tl.store(out + n * rows + r, total.to(out.dtype.element_ty), mask=r < rows)
