"""The loop of products over 32 streams at once, as two registers of lanes (`lanes.AVAILABLE`).

Two, because a lane is a chain of lookups: while one register waits for its gather the other issues
its own. Streams of a block are of like length, so few lanes wait parked at `span`.
"""

import numba as nb
import numpy as np

from qmoe.codec.decoder.lanes import (
    COUNT,
    LIST,
    accumulate,
    add,
    any_less,
    bits_at,
    both,
    drop,
    fused,
    gather,
    least,
    left8,
    load,
    pick64,
    pointer_to,
    right,
    splat,
    store,
    top_byte,
    where_negative,
    zeros,
)
from qmoe.codec.format.arrays import F32, I32, U8, U16, U32

BLOCK = LIST  # streams in flight: two registers


@nb.njit(cache=True, nogil=True)
def block_sums(
    words: U32,
    limit: int,
    starts: I32,
    row_class: U8,
    bases: I32,
    entries: U32,
    bits: int,
    piece: int,
    pieces: int,
    order: U16,
    first: int,
    classes: I32,
    x: F32,
    span: int,
    split: bool,
    sums: F32,
    negative: F32,
) -> None:
    """Sums over the streams order[first : first + BLOCK] of one piece, into sums[row] and, if
    `split`, those of negative values alone into negative[row].

    Each sum adds value * x (fused, one rounding) in the order of its stream, starting from 0.

    Args:
        words: payload and one word more; `limit` is the last word that a stream may start in.
        bases: int32 [64], place of a context's table in `entries`.
        entries: uint32 [tables << bits], `Tables.lane_entries`.
        order: uint16 [rows], the rows by falling length of their streams.
        classes, x: [span + 1 + 63 * symbols of a group], class and input at each position.
    """
    rows = min(BLOCK, order.size - first)
    start, row_at = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.int32)
    for k in range(BLOCK):
        row = order[first + min(k, rows - 1)]
        start[k], row_at[k] = starts[row * pieces + piece], row_class[row]
    found, below = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    if bits == 8:  # compiled for itself: the usual width of an index
        _run(words, limit, bases, entries, 8, start, row_at, classes, x, span, split, found, below)
    else:
        _run(
            words, limit, bases, entries, bits, start, row_at, classes, x, span, split, found, below
        )
    for k in range(rows):
        sums[order[first + k]] = found[k]
    if split:
        for k in range(rows):
            negative[order[first + k]] = below[k]


@nb.njit(inline="always")
def _run(
    words: U32,
    limit: int,
    bases: I32,
    entries: U32,
    bits: int,
    start: I32,
    row_at: I32,
    classes: I32,
    x: F32,
    span: int,
    split: bool,
    found: F32,
    below: F32,
) -> None:
    end, furthest = splat(span), splat(32 * limit + 31)
    mask, byte, position = splat((1 << bits) - 1), splat(255), splat(0xFFFF)
    at0 = at1 = splat(0)
    bit0, bit1 = load(start, 0), load(start, COUNT)
    a0, a1 = load(row_at, 0), load(row_at, COUNT)
    sum0, sum1, neg0, neg1 = zeros(), zeros(), zeros(), zeros()
    while any_less(least(at0, at1), end):
        base0 = pick64(bases, add(a0, gather(classes, at0)))
        base1 = pick64(bases, add(a1, gather(classes, at1)))
        window0, window1 = bits_at(words, bit0), bits_at(words, bit1)
        # low byte: bits taken by the group; from bit 8 on: position. An entry is added as it is
        total0, total1 = left8(at0), left8(at1)
        for _ in range(32 // bits):
            entry0 = gather(entries, add(base0, both(window0, mask)))
            entry1 = gather(entries, add(base1, both(window1, mask)))
            window0, window1 = drop(window0, entry0), drop(window1, entry1)
            total0, total1 = add(total0, entry0), add(total1, entry1)
            x0 = gather(x, both(right(total0, 8), position))
            x1 = gather(x, both(right(total1, 8), position))
            value0, value1 = top_byte(entry0), top_byte(entry1)
            sum0, sum1 = fused(value0, x0, sum0), fused(value1, x1, sum1)
            if split:
                neg0 = fused(where_negative(entry0, value0), x0, neg0)
                neg1 = fused(where_negative(entry1, value1), x1, neg1)
        bit0 = least(add(bit0, both(total0, byte)), furthest)
        bit1 = least(add(bit1, both(total1, byte)), furthest)
        at0 = least(both(right(total0, 8), position), end)
        at1 = least(both(right(total1, 8), position), end)
    store(found, 0, sum0)
    store(found, COUNT, sum1)
    store(below, 0, neg0)
    store(below, COUNT, neg1)


@nb.njit(cache=True, nogil=True)
def block_lists(
    words: U32,
    limit: int,
    starts: I32,
    row_class: U8,
    bases: I32,
    entries: U32,
    bits: int,
    piece: int,
    pieces: int,
    order: U16,
    first: int,
    classes: I32,
    span: int,
    places: I32,
    values: F32,
) -> int:
    """Decodes a block as `block_sums` does: places[k, l] and values[k, l] are position and value of
    the k-th symbol of the stream order[first + l]. Behind its end a stream has places of no input.

    Returns:
        The number of symbols.
    """
    rows = min(BLOCK, order.size - first)
    start, row_at = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.int32)
    for k in range(BLOCK):
        row = order[first + min(k, rows - 1)]
        start[k], row_at[k] = starts[row * pieces + piece], row_class[row]
    end, furthest = splat(span), splat(32 * limit + 31)
    mask, byte, position = splat((1 << bits) - 1), splat(255), splat(0xFFFF)
    at0 = at1 = splat(0)
    bit0, bit1 = load(start, 0), load(start, COUNT)
    a0, a1 = load(row_at, 0), load(row_at, COUNT)
    to = 0
    while any_less(least(at0, at1), end):
        base0 = pick64(bases, add(a0, gather(classes, at0)))
        base1 = pick64(bases, add(a1, gather(classes, at1)))
        window0, window1 = bits_at(words, bit0), bits_at(words, bit1)
        total0, total1 = left8(at0), left8(at1)
        for _ in range(32 // bits):
            entry0 = gather(entries, add(base0, both(window0, mask)))
            entry1 = gather(entries, add(base1, both(window1, mask)))
            window0, window1 = drop(window0, entry0), drop(window1, entry1)
            total0, total1 = add(total0, entry0), add(total1, entry1)
            store(places, to, least(both(right(total0, 8), position), end))
            store(places, to + COUNT, least(both(right(total1, 8), position), end))
            store(values, to, top_byte(entry0))
            store(values, to + COUNT, top_byte(entry1))
            to += BLOCK
        bit0 = least(add(bit0, both(total0, byte)), furthest)
        bit1 = least(add(bit1, both(total1, byte)), furthest)
        at0 = least(both(right(total0, 8), position), end)
        at1 = least(both(right(total1, 8), position), end)
    return to // BLOCK


@nb.njit(cache=True, nogil=True)
def apply_lists(places: I32, values: F32, count: int, x: F32, width: int, sums: F32) -> None:
    """sums[l] = sum of value * x[place] over the symbols of stream l, as `block_sums` adds.

    Args:
        places, values: from `block_lists`.
        count: symbols.
        x: float32, flat [span + 1, width].
        width: inputs, 16, 32 or 64.
        sums: float32, flat [BLOCK, width], written.
    """
    inputs = pointer_to(x, 0)
    streams = COUNT * COUNT // width  # sixteen registers of sums
    for first in range(0, BLOCK, streams):
        p, v = pointer_to(places, first), pointer_to(values, first)
        to = pointer_to(sums, first * width)
        if width == 16:
            accumulate(p, v, count, inputs, to, 1)
        elif width == 32:
            accumulate(p, v, count, inputs, to, 2)
        else:
            accumulate(p, v, count, inputs, to, 4)
