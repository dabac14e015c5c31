# ruff: noqa: ANN001, ANN201 -- arguments of device code have no Python types
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
"""Device code that every kernel shares: one lane of a warp follows one stream segment. Knows
nothing about experts or files.

The loop that the kernels replace, for one segment of one row (`x` in the order of the coded
columns, one zero on each side), from a stored bit and position on:

    for _ in range(groups):
        table = lut[context_map[row_class + column_class[pos]]]         # latched once per G symbols
        for _ in range(G):
            advance, value, nbits = table[next L bits]
            pos += advance; y += value * x[pos]; skip nbits
        pos = min(pos, limit)

A lookup entry is one unsigned integer: advance in bits 0..5, value + bias in the next 6 (16-bit
entries) or 8 bits (32-bit entries), code length above. Or-ing all other bits of the mantissa of
2^23 to one and subtracting that constant turns the value field into a float in two instructions,
multiplied by VALUE_SCALE = 64; the sums are divided by 64 at the end.

Safety, whatever the words hold:
- the word index only grows, by one word per group at most (G * L <= 32), and is masked at the end
  of its program's words; a lane holds the next three words, so that one is in flight while a group
  is decoded;
- a table index is L bits, the table base comes from tables that were built and checked on the host;
- `pos` is clamped to `limit` after each group, so inside a group it stays below limit + 63 * G: x
  has that many zeros behind it;
- the number of groups is a stored count; nothing in the stream decides how long a loop runs.
"""

import triton
import triton.language as tl

from qmoe.kernels.interleave import BLOCK_TILES
from qmoe.kernels.interleave import NEAR as NEAR_END

VALUE_SCALE = 64  # values leave `symbol` multiplied by this
BLOCK = tl.constexpr(BLOCK_TILES)
NEAR = tl.constexpr(NEAR_END)


@triton.jit
def address(base, index, stride, ASM: tl.constexpr):
    """base + index * stride in bytes as int64; one IMAD.WIDE instead of two LEAs (the compiler must
    not see `stride`).
    """
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 t; mul.wide.u32 t, $1, $2; add.s64 $0, t, $3; }", "=l,r,r,l",
            [index, stride, base.to(tl.int64)], dtype=tl.int64, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return base.to(tl.int64) + index.to(tl.int64) * stride.to(tl.int64)


@triton.jit
def gather(base, index, stride, TYPE: tl.constexpr, ASM: tl.constexpr):
    """Loads TYPE at `base` + index * stride bytes; base is any pointer, stride must equal TYPE's
    size.
    """
    if ASM:
        return tl.load(address(base, index, stride, ASM).to(tl.pointer_type(TYPE)))
    else:
        return tl.load(base.to(tl.pointer_type(TYPE)) + index)


@triton.jit
def shared_word(memory, index):
    """Element `index` of an int16 or int32 array in shared memory as uint32; the hardware address
    is taken modulo the array's size, a power of two.
    """
    word = memory.gather(index, axis=0)
    if word.dtype == tl.int32:
        return word.to(tl.uint32, bitcast=True)
    else:
        return word.to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def symbol(
    tables, table, window, entry_bytes,
    L: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Looks up the code in the low bits of `window` (uint32).

    `table` is the address of the table, or its first entry in the shared-memory array `tables`.
    Returns (advance int32, value float32 * 64, code length int32).
    """
    index = (window & ((1 << L) - 1)).to(tl.int32)
    if SHARED:
        e = shared_word(tables, table | index)  # below 16 << L for the compiler to see: no masking
    elif WIDE:
        e = gather(table, index, entry_bytes, tl.uint32, ASM)
    else:
        e = gather(table, index, entry_bytes, tl.uint16, ASM).to(tl.uint32)
    if WIDE:
        length = e >> 14
        # 2^23 + 0x3C03F + 64 * 128
        value = (e | 0x4B03C03F).to(tl.float32, bitcast=True) - 8642623.0
    else:
        length = e >> 12
        # 2^23 + 0xF03F + 64 * 32
        value = (e | 0x4B00F03F).to(tl.float32, bitcast=True) - 8452159.0
    return (e & 63).to(tl.int32), value, length.to(tl.int32)


@triton.jit
def window_of(low, high, used):
    """The 32 bits of the stream from bit `used` (0..63) of two words (int32) on, uint32; bits
    beyond the two words are zeros.
    """
    high, low = high.to(tl.uint32, bitcast=True), low.to(tl.uint32, bitcast=True)
    both = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    return (both >> used.to(tl.uint64)).to(tl.uint32)


@triton.jit
def groups_of(records, piece, tile0, s, S: tl.constexpr):
    """Groups that the tiles from `tile0` on have in segment s; tile0 and those behind it that go
    with it lie in one block, which is cut behind equal numbers of groups.
    """
    most = tl.load(records + (piece + tile0) * 2 + 1) & 0x7FFF
    if S > 1:
        block = tile0 // BLOCK * BLOCK
        inner = ((tl.load(records + (piece + block) * 2 + 1) & 0x7FFF) + (S - 1)) // S
        most = tl.maximum(tl.minimum(most - s * inner, inner), 0)
    return most


@triton.jit
def begin(
    lane, zero, piece, cut, tile, s, limit,
    words, records, lanes, row_classes, cuts, starts, word_bytes,
    S: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """What a lane needs before its first group; only loads, so that they can be in flight together.

    Args:
        lane, zero: 0..32 * W - 1, and zeros; made by the caller, as Gluon gives tensors a layout.
        piece: the first tile of the piece; cut: the first program of the piece's segment in `cuts`.
        tile: this lane's, in the piece; s: its segment; limit: the matrix's span.

    Returns:
        row, row class, next word's index, its end, three words, bits used of the first, position.
    """
    tile += zero  # the same for all lanes where a program is a warp
    at = piece + tile
    base = tl.load(records + at * 2)
    end = base + (tl.load(records + at * 2 + 1) >> 15) * 32
    row = tl.load(lanes + at * 32 + lane % 32).to(tl.int32)
    row_class = tl.load(row_classes + at * 32 + lane % 32).to(tl.int32)
    pos = zero
    bit = zero
    if S > 1:
        inner = zero + s > 0
        record = tl.load(cuts + cut + tile, mask=inner, other=0)
        here = tl.load(starts + (cut + tile) * 32 + lane % 32, mask=inner, other=0).to(tl.int32)
        high = (record & 0x7FFFFFFF) * 32 + lane % 32
        rest = tl.load(starts + high, mask=record < 0, other=0).to(tl.int32)
        here &= 0xFFFF
        step = here & NEAR
        pos = tl.where(step == NEAR, limit, (record & 0x7FF) + step)
        bit = (record >> 11) * 32 + (here >> 8)
        whole = here | rest << 16
        pos = tl.where(record < 0, whole & 0x7FF, pos)
        bit = tl.where(record < 0, (whole >> 11) & 0x1FFFFF, bit)
    first = base + (bit >> 5) * 32
    next_word = first + lane % 32
    if ASM:  # the segment's lines, one a lane; prefetched is 0
        share = (end - base) // (32 * S)
        line = tl.minimum(first + tl.minimum(lane % 32, share) * 32, end - 1)
        prefetched = tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l",
            [address(words, line, word_bytes, ASM)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        prefetched = zero
    low = tl.load(words + next_word)
    high_word = tl.load(words + next_word + 32)
    third = next_word + 64
    ahead = tl.load(words + third, mask=third < end, other=0)
    return row, row_class, third + 32 + prefetched, end, low, high_word, ahead, bit & 31, pos


@triton.jit
def refill(words, next_word, end, low, high, ahead, used, word_bytes, ASM: tl.constexpr):
    """Steps to the next word when 32 bits are used (`used` is at most 63). What is loaded here is
    the third word: a group later it is looked at for the first time.

    Returns (next_word, low, high, ahead, used).
    """
    step = used & 32
    need = used > 31
    low = tl.where(need, high, low)
    high = tl.where(need, ahead, high)
    if ASM:
        at = address(words, next_word, word_bytes, ASM).to(tl.pointer_type(tl.int32))
    else:
        at = words + next_word
    ahead = tl.load(at, mask=need & (next_word < end), other=ahead)
    return next_word + step, low, high, ahead, used & 31


@triton.jit
def latch(
    lut, classes, context_map, pos, entry_bytes, word_bytes,
    L: tl.constexpr, ASM: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """The table for the column class at `pos`; context_map already points at the row's class.

    Its address, or if SHARED its first entry among those of its group.
    """
    column_class = gather(classes, pos, word_bytes >> 2, tl.uint8, ASM).to(tl.int32)
    first = gather(context_map, column_class, word_bytes, tl.int32, ASM)
    if SHARED:
        return first & (15 << L)  # says to the compiler what the host has checked
    else:
        return address(lut, first, entry_bytes, ASM)


@triton.jit
def expert_of(group_expert, group, experts):
    """Expert of a group as int32, -1 if it is none of 0..experts - 1 (`group_expert` may be int64
    from anywhere).
    """
    e = tl.load(group_expert + group)
    return tl.where((e >= 0) & (e < experts), e, -1).to(tl.int32)
