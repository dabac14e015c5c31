"""Compiled loops of the decoders: several streams at once, as each is a chain of lookups.

A finished stream parks: its position stays at `span`, where `slots` names no column and activations
are zero, while its bit cursor runs on into its neighbours, held inside the words. So no lane needs
a mask, here or in a kernel.
"""

import numba as nb
import numpy as np

from qmoe.codec.format.arrays import F32, I8, I32, U8, U32

ONE, LENGTH, ADVANCE, BYTE = np.uint64(1), np.uint64(15), np.uint64(63), np.uint64(8)


@nb.njit(inline="always")
def next_bits(words: U32, limit: np.uint64, bit: np.uint64) -> np.uint64:
    """At least the next 32 bits at `bit`. All indices are unsigned: numba then omits the
    wrap-around of negative ones."""
    word = min(bit >> np.uint64(5), limit)
    pair = np.uint64(words[word]) | np.uint64(words[word + ONE]) << np.uint64(32)
    return pair >> (bit & np.uint64(31))


@nb.njit(cache=True, nogil=True)
def _decode_pair(
    words: U32,
    limit: int,
    start0: int,
    start1: int,
    classes: U8,
    slots: I32,
    row_class0: int,
    row_class1: int,
    table_of: U8,
    lookup: U32,
    bits: int,
    line0: I8,
    line1: I8,
) -> None:
    """Decodes two streams of one piece into int8 lines of cols + 1 elements."""
    span, shift, last = np.uint64(slots.size - 1), np.uint64(bits), np.uint64(limit)
    mask = (ONE << shift) - ONE
    a0, a1 = np.uint64(row_class0), np.uint64(row_class1)
    bit0, bit1 = np.uint64(start0), np.uint64(start1)
    at0 = at1 = np.uint64(0)
    # Two rows at once: the next lookup of a stream waits for the length of the code before it, so
    # that a single one leaves gaps; two chains fill each other's.
    while min(at0, at1) < span:
        # One table for the whole group of symbols: it is chosen by the position where the group
        # begins, as the encoder did, not anew for every symbol.
        base0 = np.uint64(table_of[a0 + np.uint64(classes[at0])]) << shift
        base1 = np.uint64(table_of[a1 + np.uint64(classes[at1])]) << shift
        window0, window1 = next_bits(words, last, bit0), next_bits(words, last, bit1)
        # 32 // L codes of at most L bits fit in the 32 bits that a window surely holds.
        for _ in range(32 // bits):
            entry0 = np.uint64(lookup[base0 | (window0 & mask)])
            entry1 = np.uint64(lookup[base1 | (window1 & mask)])
            window0 >>= entry0 & LENGTH
            window1 >>= entry1 & LENGTH
            bit0 += entry0 & LENGTH
            bit1 += entry1 & LENGTH
            # a finished stream stays at `span`, whose slot is the spare column behind the row
            at0 = min(at0 + ((entry0 >> BYTE) & ADVANCE), span)
            at1 = min(at1 + ((entry1 >> BYTE) & ADVANCE), span)
            # += as a value above V comes in parts: escapes add to the weight without moving on;
            # runs of zeros add 0 where they end
            line0[np.uint64(slots[at0])] += np.int8(entry0 >> np.uint64(16))
            line1[np.uint64(slots[at1])] += np.int8(entry1 >> np.uint64(16))


@nb.njit(cache=True, nogil=True)
def _decode_two_rows(
    words: U32,
    limit: int,
    starts: I32,
    row_class: U8,
    slot_class: U8,
    table_of: U8,
    lookup: U32,
    bits: int,
    slots: I32,
    row: int,
    other: int,
    line0: I8,
    line1: I8,
) -> None:
    pieces = slots.shape[0]
    line0[:] = 0
    line1[:] = 0
    for p in range(pieces):
        _decode_pair(
            words,
            limit,
            starts[row * pieces + p],
            starts[other * pieces + p],
            slot_class[p],
            slots[p],
            row_class[row],
            row_class[other],
            table_of,
            lookup,
            bits,
            line0,
            line1,
        )


@nb.njit(cache=True, nogil=True)
def decode_rows(
    words: U32,
    limit: int,
    starts: I32,
    row_class: U8,
    slot_class: U8,
    table_of: U8,
    lookup: U32,
    bits: int,
    slots: I32,
    first: int,
    end: int,
    out: I8,
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
        other = min(row + 1, end - 1)  # an odd last row is its own neighbour
        _decode_two_rows(
            words,
            limit,
            starts,
            row_class,
            slot_class,
            table_of,
            lookup,
            bits,
            slots,
            row,
            other,
            line0,
            line1,
        )
        for j in range(cols):
            out[row, j] = line0[j]
        for j in range(cols):
            out[other, j] = line1[j]


@nb.njit(cache=True, nogil=True)
def dense_rows(
    words: U32,
    limit: int,
    starts: I32,
    row_class: U8,
    slot_class: U8,
    table_of: U8,
    lookup: U32,
    bits: int,
    slots: I32,
    first: int,
    end: int,
    row_scale: F32,
    row_scale_neg: F32,
    col_scale: F32,
    out: F32,
) -> None:
    """As `decode_rows`, into weights: float32 [rows, cols], (code * column scale) * row scale."""
    cols = out.shape[1]
    line0, line1 = np.empty(cols + 1, np.int8), np.empty(cols + 1, np.int8)
    for row in range(first, end, 2):
        other = min(row + 1, end - 1)
        _decode_two_rows(
            words,
            limit,
            starts,
            row_class,
            slot_class,
            table_of,
            lookup,
            bits,
            slots,
            row,
            other,
            line0,
            line1,
        )
        _scale(line0, col_scale, row_scale[row], row_scale_neg[row], out[row])
        _scale(line1, col_scale, row_scale[other], row_scale_neg[other], out[other])


@nb.njit(cache=True, nogil=True)
def _scale(line: I8, col_scale: F32, above: np.float32, below: np.float32, out: F32) -> None:
    if above == below:  # two loops, so that the usual one has no choice in it and is vectorized
        for j in range(out.size):
            out[j] = np.float32(line[j]) * col_scale[j] * above
    else:
        for j in range(out.size):
            out[j] = np.float32(line[j]) * col_scale[j] * (below if line[j] < 0 else above)
