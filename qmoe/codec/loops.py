"""Compiled loops of the decoders. Every one follows several streams at once, since one stream is a chain of dependent lookups.

A finished stream parks: its position stays at `span`, where `slots` names no column and activations are zero, while its bit
cursor runs on into its neighbours, held inside the words. So no lane needs a mask, here or in a kernel.
"""

import numba as nb
import numpy as np
from numpy.typing import NDArray

I8, U8, U32, I32, F32 = NDArray[np.int8], NDArray[np.uint8], NDArray[np.uint32], NDArray[np.int32], NDArray[np.float32]


@nb.njit(inline="always")
def _window(words: U32, limit: int, bit: int) -> np.uint64:
    """At least the next 32 bits at `bit`."""
    word = min(bit >> 5, limit)
    pair = np.uint64(words[word]) | np.uint64(words[word + 1]) << np.uint64(32)
    return pair >> np.uint64(bit & 31)


@nb.njit(cache=True, nogil=True)
def _decode_pair(
    words: U32, limit: int, bit0: int, bit1: int, span: int, a0: int, a1: int, classes0: U8, classes1: U8,
    slot0: I32, slot1: I32, table_of: U8, lookup: U32, bits: int, line0: I8, line1: I8,
) -> None:
    """Decodes two streams into int8 lines of cols + 1 elements."""
    mask = np.uint64((1 << bits) - 1)
    latch = 32 // bits
    at0 = at1 = 0
    while at0 < span or at1 < span:
        base0 = np.int64(table_of[a0 + classes0[at0]]) << bits
        base1 = np.int64(table_of[a1 + classes1[at1]]) << bits
        window0 = _window(words, limit, bit0)
        window1 = _window(words, limit, bit1)
        for _ in range(latch):
            entry0 = np.int32(lookup[base0 + np.int64(window0 & mask)])
            entry1 = np.int32(lookup[base1 + np.int64(window1 & mask)])
            length0, length1 = entry0 & 15, entry1 & 15
            window0 >>= np.uint64(length0)
            window1 >>= np.uint64(length1)
            bit0 += length0
            bit1 += length1
            at0 = min(at0 + ((entry0 >> 8) & 63), span)
            at1 = min(at1 + ((entry1 >> 8) & 63), span)
            line0[slot0[at0]] += np.int8(entry0 >> 16)
            line1[slot1[at1]] += np.int8(entry1 >> 16)


@nb.njit(cache=True, nogil=True)
def _decode_two_rows(
    words: U32, limit: int, starts: I32, row_class: U8, slot_class: U8, table_of: U8, lookup: U32, bits: int, slots: I32,
    row: int, other: int, line0: I8, line1: I8,
) -> None:
    pieces, span = slots.shape[0], slots.shape[1] - 1
    line0[:] = 0
    line1[:] = 0
    for p in range(pieces):
        _decode_pair(
            words, limit, starts[row * pieces + p], starts[other * pieces + p], span, row_class[row], row_class[other],
            slot_class[p], slot_class[p], slots[p], slots[p], table_of, lookup, bits, line0, line1,
        )


@nb.njit(cache=True, nogil=True)
def decode_rows(
    words: U32, limit: int, starts: I32, row_class: U8, slot_class: U8, table_of: U8, lookup: U32, bits: int, slots: I32,
    first: int, end: int, out: I8,
) -> None:
    """Rows first..end - 1 of out, int8 [rows, cols].

    Args:
        words: payload uint32, `limit` words and padding; starts int32 [streams + 1], bit offsets.
        row_class: uint8 [rows]; slot_class: uint8 [pieces, span + 1]; table_of: uint8 [contexts].
        lookup: uint32 [tables << bits], entries of `Tables.lookup`; bits: L.
        slots: int32 [pieces, span + 1].
    """
    cols = out.shape[1]
    line0, line1 = np.empty(cols + 1, np.int8), np.empty(cols + 1, np.int8)
    for row in range(first, end, 2):
        other = min(row + 1, end - 1)
        _decode_two_rows(
            words, limit, starts, row_class, slot_class, table_of, lookup, bits, slots, row, other, line0, line1
        )
        out[row] = line0[:cols]
        out[other] = line1[:cols]


@nb.njit(cache=True, nogil=True)
def dense_rows(
    words: U32, limit: int, starts: I32, row_class: U8, slot_class: U8, table_of: U8, lookup: U32, bits: int, slots: I32,
    first: int, end: int, row_scale: F32, row_scale_neg: F32, col_scale: F32, out: F32,
) -> None:
    """As `decode_rows`, into weights: float32 [rows, cols], (code * column scale) * row scale."""
    cols = out.shape[1]
    line0, line1 = np.empty(cols + 1, np.int8), np.empty(cols + 1, np.int8)
    for row in range(first, end, 2):
        other = min(row + 1, end - 1)
        _decode_two_rows(
            words, limit, starts, row_class, slot_class, table_of, lookup, bits, slots, row, other, line0, line1
        )
        _scale(line0, col_scale, row_scale[row], row_scale_neg[row], out[row])
        _scale(line1, col_scale, row_scale[other], row_scale_neg[other], out[other])


@nb.njit(cache=True, nogil=True)
def _scale(line: I8, col_scale: F32, above: np.float32, below: np.float32, out: F32) -> None:
    if above == below:
        for j in range(out.size):
            out[j] = np.float32(line[j]) * col_scale[j] * above
    else:
        for j in range(out.size):
            out[j] = np.float32(line[j]) * col_scale[j] * (below if line[j] < 0 else above)


@nb.njit(cache=True, nogil=True)
def matvec_rows(
    words: U32, limit: int, starts: I32, row_class: U8, slot_class: U8, table_of: U8, lookup: U32, bits: int,
    first: int, end: int, x: F32, split: bool, out: F32,
) -> None:
    """Sums of rows first..end - 1: out[0] over all codes and, if `split`, out[1] over the negative ones; out [2, rows].

    x: float32 [pieces, span + 1], scaled activations by position, zero where there is no column.
    """
    pieces, span = slot_class.shape[0], slot_class.shape[1] - 1
    mask = np.uint64((1 << bits) - 1)
    latch = 32 // bits
    zero = np.float32(0)
    for row0 in range(first, end, 4):
        row1, row2, row3 = min(row0 + 1, end - 1), min(row0 + 2, end - 1), min(row0 + 3, end - 1)
        a0, a1 = np.int64(row_class[row0]), np.int64(row_class[row1])
        a2, a3 = np.int64(row_class[row2]), np.int64(row_class[row3])
        sum0 = sum1 = sum2 = sum3 = zero
        neg0 = neg1 = neg2 = neg3 = zero
        for p in range(pieces):
            classes, xs = slot_class[p], x[p]
            bit0, bit1 = np.int64(starts[row0 * pieces + p]), np.int64(starts[row1 * pieces + p])
            bit2, bit3 = np.int64(starts[row2 * pieces + p]), np.int64(starts[row3 * pieces + p])
            at0 = at1 = at2 = at3 = 0
            while min(min(at0, at1), min(at2, at3)) < span:
                base0 = np.int64(table_of[a0 + classes[at0]]) << bits
                base1 = np.int64(table_of[a1 + classes[at1]]) << bits
                base2 = np.int64(table_of[a2 + classes[at2]]) << bits
                base3 = np.int64(table_of[a3 + classes[at3]]) << bits
                window0, window1 = _window(words, limit, bit0), _window(words, limit, bit1)
                window2, window3 = _window(words, limit, bit2), _window(words, limit, bit3)
                for _ in range(latch):
                    entry0 = np.int32(lookup[base0 + np.int64(window0 & mask)])
                    entry1 = np.int32(lookup[base1 + np.int64(window1 & mask)])
                    entry2 = np.int32(lookup[base2 + np.int64(window2 & mask)])
                    entry3 = np.int32(lookup[base3 + np.int64(window3 & mask)])
                    window0 >>= np.uint64(entry0 & 15)
                    window1 >>= np.uint64(entry1 & 15)
                    window2 >>= np.uint64(entry2 & 15)
                    window3 >>= np.uint64(entry3 & 15)
                    bit0 += entry0 & 15
                    bit1 += entry1 & 15
                    bit2 += entry2 & 15
                    bit3 += entry3 & 15
                    at0 = min(at0 + ((entry0 >> 8) & 63), span)
                    at1 = min(at1 + ((entry1 >> 8) & 63), span)
                    at2 = min(at2 + ((entry2 >> 8) & 63), span)
                    at3 = min(at3 + ((entry3 >> 8) & 63), span)
                    term0 = np.float32(np.int8(entry0 >> 16)) * xs[at0]
                    term1 = np.float32(np.int8(entry1 >> 16)) * xs[at1]
                    term2 = np.float32(np.int8(entry2 >> 16)) * xs[at2]
                    term3 = np.float32(np.int8(entry3 >> 16)) * xs[at3]
                    sum0 += term0
                    sum1 += term1
                    sum2 += term2
                    sum3 += term3
                    if split:
                        neg0 += term0 if entry0 & 0x800000 else zero
                        neg1 += term1 if entry1 & 0x800000 else zero
                        neg2 += term2 if entry2 & 0x800000 else zero
                        neg3 += term3 if entry3 & 0x800000 else zero
        out[0, row3], out[0, row2], out[0, row1], out[0, row0] = sum3, sum2, sum1, sum0
        out[1, row3], out[1, row2], out[1, row1], out[1, row0] = neg3, neg2, neg1, neg0


@nb.njit(cache=True, nogil=True)
def matvec_rows_batch(
    words: U32, limit: int, starts: I32, row_class: U8, slot_class: U8, table_of: U8, lookup: U32, bits: int,
    first: int, end: int, x: F32, split: bool, out: F32,
) -> None:
    """As `matvec_rows` for several activations: x float32 [pieces, span + 1, n], out float32 [2, rows, n], zeroed."""
    pieces, span = slot_class.shape[0], slot_class.shape[1] - 1
    mask = np.uint64((1 << bits) - 1)
    latch = 32 // bits
    for row in range(first, end):
        a = np.int64(row_class[row])
        total, below = out[0, row], out[1, row]
        for p in range(pieces):
            classes, xs = slot_class[p], x[p]
            bit, at = np.int64(starts[row * pieces + p]), 0
            while at < span:
                base = np.int64(table_of[a + classes[at]]) << bits
                window = _window(words, limit, bit)
                for _ in range(latch):
                    entry = np.int32(lookup[base + np.int64(window & mask)])
                    window >>= np.uint64(entry & 15)
                    bit += entry & 15
                    at = min(at + ((entry >> 8) & 63), span)
                    if entry >> 16:
                        value = np.float32(np.int8(entry >> 16))
                        for k in range(total.size):
                            total[k] += value * xs[at, k]
                        if split and value < 0:
                            for k in range(total.size):
                                below[k] += value * xs[at, k]
