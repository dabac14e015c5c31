"""Compiled loops of products that never write the weights down, over streams as in
`qmoe.codec.decoder.loops`.
"""

from typing import Any

import numba as nb
import numpy as np

from qmoe.codec.decoder.loops import ADVANCE, BYTE, LENGTH, ONE, next_bits
from qmoe.codec.decoder.registers import fused
from qmoe.codec.format.arrays import F32, I16, I32, U8, U32, U64

# of 64-bit entries: a shift takes six bits of its count as it is, an advance fills a byte
_SIX, _EIGHT, _SIGN = np.uint64(63), np.uint64(255), np.uint64(63)
_LOW, _MARK = np.uint64((1 << 32) - 1), np.uint64(1 << 32)


@nb.extending.intrinsic
def _leading_zeros(context: Any, x: Any) -> Any:
    """Of 64 bits, not all zero."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctlz(arguments[0], nb.core.cgutils.true_bit)

    return nb.types.uint64(nb.types.uint64), code


@nb.njit(inline="always")
def _marked(words: U32, limit: np.uint64, bit: np.uint64) -> np.uint64:
    """The next 32 bits at `bit` with a one above: its place tells later what was shifted out."""
    window: np.uint64 = (next_bits(words, limit, bit) & _LOW) | _MARK
    return window


@nb.njit(inline="always")
def _used(window: np.uint64) -> np.uint64:
    """Bits that were shifted out of a `_marked` window."""
    used: np.uint64 = _leading_zeros(window) - np.uint64(31)
    return used


@nb.njit(cache=True, nogil=True)
def place_inputs(x: F32, col_index: I16, slots: I32, out: F32) -> None:
    """out[p, t] = x * column scale of the column at position t of piece p, 0 where there is none
    and behind the last position."""
    for p in range(slots.shape[0]):
        for t in range(slots.shape[1]):
            column = slots[p, t]
            out[p, t] = x[column] * scale(col_index[column]) if column < x.size else np.float32(0)
        out[p, slots.shape[1] :] = np.float32(0)


@nb.njit(cache=True, nogil=True)
def place_classes(slot_class: U8, out: I32) -> None:
    """out[p, t] = slot_class, the last one behind the last position."""
    for p in range(slot_class.shape[0]):
        for t in range(slot_class.shape[1]):
            out[p, t] = slot_class[p, t]
        out[p, slot_class.shape[1] :] = slot_class[p, -1]


@nb.extending.intrinsic
def _as_float(context: Any, bits: Any) -> Any:
    """The float32 of these 32 bits."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(nb.types.float32))

    return nb.types.float32(nb.types.int32), code


@nb.njit(inline="always")
def scale(index: int) -> np.float32:
    """`qmoe.types.grid_scale` of one index."""
    value: np.float32 = _as_float(np.int32((index + 8128) << 17))
    return value


@nb.extending.intrinsic
def _value(context: Any, entry: Any) -> Any:
    """The float32 in the upper half of an entry."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        upper = builder.lshr(arguments[0], arguments[0].type(32))
        bits = builder.trunc(upper, context.get_value_type(nb.types.uint32))
        return builder.bitcast(bits, context.get_value_type(nb.types.float32))

    return nb.types.float32(nb.types.uint64), code


@nb.njit(cache=True, nogil=True)
def matvec_rows(
    words: U32,
    limit: int,
    starts: I32,
    row_class: U8,
    slot_class: U8,
    table_of: U8,
    entries: U64,
    bits: int,
    first: int,
    end: int,
    x: F32,
    split: bool,
    sums: F32,
    negative: F32,
) -> None:
    """Sums of value * x over the streams of rows first..end - 1, into sums [pieces, rows] and, if
    `split`, those of the negative values alone into negative [pieces, rows].

    Each sum adds (fused, one rounding) in the order of its stream, starting from 0.

    entries: uint64 [tables << bits], `Tables.entries`. x: float32 [pieces, span + 1 + 63 * symbols
    of a group], from `place_inputs`: a group may pass the end, and is clamped behind it.
    """
    arrays = (words, starts, row_class, slot_class, table_of, entries, x, sums, negative)
    if bits == 8:  # compiled for itself: the usual index width, a third faster as a constant
        _matvec_rows(arrays, limit, 8, first, end, split)
    else:
        _matvec_rows(arrays, limit, bits, first, end, split)


@nb.njit(inline="always")
def _matvec_rows(
    arrays: tuple[Any, ...], limit: int, bits: int, first: int, end: int, split: bool
) -> None:
    words, starts, row_class, slot_class, table_of, entries, x, sums, negative = arrays
    pieces, span = slot_class.shape[0], np.uint64(slot_class.shape[1] - 1)
    shift, last, zero = np.uint64(bits), np.uint64(limit), np.float32(0)
    mask = (ONE << shift) - ONE
    # Four rows at once: a lookup waits for the length of the code before it, and four such chains
    # fill each other's gaps. Behind the last row it is repeated, and writes what it wrote.
    for row0 in range(first, end, 4):
        row1, row2, row3 = min(row0 + 1, end - 1), min(row0 + 2, end - 1), min(row0 + 3, end - 1)
        a0, a1 = np.uint64(row_class[row0]), np.uint64(row_class[row1])
        a2, a3 = np.uint64(row_class[row2]), np.uint64(row_class[row3])
        for p in range(pieces):
            sum0 = sum1 = sum2 = sum3 = zero
            neg0 = neg1 = neg2 = neg3 = zero
            classes, xs = slot_class[p], x[p]
            bit0 = np.uint64(starts[row0 * pieces + p])
            bit1 = np.uint64(starts[row1 * pieces + p])
            bit2 = np.uint64(starts[row2 * pieces + p])
            bit3 = np.uint64(starts[row3 * pieces + p])
            at0 = at1 = at2 = at3 = np.uint64(0)
            while min(min(at0, at1), min(at2, at3)) < span:
                base0 = np.uint64(table_of[a0 + np.uint64(classes[at0])]) << shift
                base1 = np.uint64(table_of[a1 + np.uint64(classes[at1])]) << shift
                base2 = np.uint64(table_of[a2 + np.uint64(classes[at2])]) << shift
                base3 = np.uint64(table_of[a3 + np.uint64(classes[at3])]) << shift
                window0, window1 = _marked(words, last, bit0), _marked(words, last, bit1)
                window2, window3 = _marked(words, last, bit2), _marked(words, last, bit3)
                for _ in range(32 // bits):
                    entry0 = entries[base0 | (window0 & mask)]
                    entry1 = entries[base1 | (window1 & mask)]
                    entry2 = entries[base2 | (window2 & mask)]
                    entry3 = entries[base3 | (window3 & mask)]
                    window0 >>= entry0 & _SIX
                    window1 >>= entry1 & _SIX
                    window2 >>= entry2 & _SIX
                    window3 >>= entry3 & _SIX
                    at0 += (entry0 >> BYTE) & _EIGHT
                    at1 += (entry1 >> BYTE) & _EIGHT
                    at2 += (entry2 >> BYTE) & _EIGHT
                    at3 += (entry3 >> BYTE) & _EIGHT
                    value0, value1 = _value(entry0), _value(entry1)
                    value2, value3 = _value(entry2), _value(entry3)
                    sum0, sum1 = fused(value0, xs[at0], sum0), fused(value1, xs[at1], sum1)
                    sum2, sum3 = fused(value2, xs[at2], sum2), fused(value3, xs[at3], sum3)
                    if split:
                        neg0 = fused(value0 if entry0 >> _SIGN else zero, xs[at0], neg0)
                        neg1 = fused(value1 if entry1 >> _SIGN else zero, xs[at1], neg1)
                        neg2 = fused(value2 if entry2 >> _SIGN else zero, xs[at2], neg2)
                        neg3 = fused(value3 if entry3 >> _SIGN else zero, xs[at3], neg3)
                bit0, bit1 = bit0 + _used(window0), bit1 + _used(window1)
                bit2, bit3 = bit2 + _used(window2), bit3 + _used(window3)
                at0, at1 = min(at0, span), min(at1, span)
                at2, at3 = min(at2, span), min(at3, span)
            sums[p, row3], sums[p, row2], sums[p, row1], sums[p, row0] = sum3, sum2, sum1, sum0
            if split:
                negative[p, row3], negative[p, row2] = neg3, neg2
                negative[p, row1], negative[p, row0] = neg1, neg0


@nb.njit(cache=True, nogil=True)
def add_up(sums: F32, negative: F32, split: bool, row_index: I16, below: I16, out: F32) -> None:
    """out[row] = sum over pieces * row scale, and if `split` the sum over the negative values times
    what their scale differs by."""
    for row in range(out.size):
        total, under = np.float32(0), np.float32(0)
        for p in range(sums.shape[0]):
            total += sums[p, row]
        out[row] = total * scale(row_index[row])
        if split:
            for p in range(sums.shape[0]):
                under += negative[p, row]
            out[row] += under * (scale(below[row]) - scale(row_index[row]))


@nb.njit(cache=True, nogil=True)
def matvec_rows_batch(
    words: U32,
    limit: int,
    starts: I32,
    row_class: U8,
    slot_class: U8,
    table_of: U8,
    lookup: U32,
    bits: int,
    first: int,
    end: int,
    x: F32,
    split: bool,
    out: F32,
) -> None:
    """As `matvec_rows` for several activations: x float32 [pieces, span + 1, n], out float32 [2,
    pieces, rows, n], zeroed."""
    pieces, span = slot_class.shape[0], np.uint64(slot_class.shape[1] - 1)
    shift, last = np.uint64(bits), np.uint64(limit)
    mask = (ONE << shift) - ONE
    for row in range(first, end):
        a = np.uint64(row_class[row])
        for p in range(pieces):
            classes, xs = slot_class[p], x[p]
            total, below = out[0, p, row], out[1, p, row]
            bit, at = np.uint64(starts[row * pieces + p]), np.uint64(0)
            while at < span:
                base = np.uint64(table_of[a + np.uint64(classes[at])]) << shift
                window = next_bits(words, last, bit)
                for _ in range(32 // bits):
                    entry = np.uint64(lookup[base | (window & mask)])
                    window >>= entry & LENGTH
                    bit += entry & LENGTH
                    at = min(at + ((entry >> BYTE) & ADVANCE), span)
                    value = np.float32(np.int8(entry >> np.uint64(16)))
                    if value != 0:
                        for k in range(total.size):
                            total[k] = fused(value, xs[at, k], total[k])
                        if split and value < 0:
                            for k in range(total.size):
                                below[k] = fused(value, xs[at, k], below[k])
