"""The loops of products over the 64 streams of a block at once (`registers.AVAILABLE`).

Streams of a block have about as many symbols, so few lanes wait parked at `span`.
"""

from typing import Any

import numba as nb
import numpy as np

from qmoe.codec.decoder.lanes import (
    add,
    any_less,
    bits_at,
    both,
    doubled,
    drop,
    gather,
    gather_pairs,
    least,
    left8,
    load,
    no_pairs,
    no_sums,
    pick64,
    right,
    splat,
    store,
    top_byte,
    where_negative,
)
from qmoe.codec.decoder.registers import COUNT, STREAMS, accumulate, fused, pointer_to
from qmoe.codec.format.arrays import F32, I32, U8, U16, U32

BLOCK = STREAMS
FEW = 4  # inputs that `block_few` takes, as two pairs


@nb.njit(inline="always")
def _begin(starts: I32, row_class: U8, piece: int, pieces: int, order: U16, first: int) -> Any:
    """Cursors and classes of a block's streams; behind the last row it is repeated."""
    start, row_at = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.int32)
    for k in range(BLOCK):
        row = np.int64(order[min(first + k, order.size - 1)])
        start[k], row_at[k] = starts[row * pieces + piece], row_class[row]
    return load(start, 0), load(row_at, 0)


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
    found, below = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    bit, row_at = _begin(starts, row_class, piece, pieces, order, first)
    arrays = (words, bases, entries, classes, x, found, below)
    # the usual cases are compiled for themselves: a third faster, by constants and fewer registers
    if bits == 8 and not split:
        _run(arrays, limit, 8, bit, row_at, span, False)
    elif bits == 10 and not split:
        _run(arrays, limit, 10, bit, row_at, span, False)
    else:
        _run(arrays, limit, bits, bit, row_at, span, split)
    rows = min(BLOCK, order.size - first)
    for k in range(rows):
        sums[order[first + k]] = found[k]
    if split:
        for k in range(rows):
            negative[order[first + k]] = below[k]


@nb.njit(inline="always")
def _run(
    arrays: tuple[Any, ...], limit: int, bits: int, bit: Any, row_at: Any, span: int, split: bool
) -> None:
    words, bases, entries, classes, x, found, below = arrays
    end, furthest = splat(span), splat(32 * limit + 31)
    mask, byte, position = splat((1 << bits) - 1), splat(255), splat(0xFFFF)
    at, sums, under = splat(0), no_sums(), no_sums()
    while any_less(at, end):
        base = pick64(bases, add(row_at, gather(classes, at)))
        window = bits_at(words, bit)
        # low byte: bits taken by the group; from bit 8 on: position. An entry is added as it is
        total = left8(at)
        for _ in range(32 // bits):
            entry = gather(entries, add(base, both(window, mask)))
            window, total = drop(window, entry), add(total, entry)
            inputs = gather(x, both(right(total, 8), position))
            value = top_byte(entry)
            sums = fused(value, inputs, sums)
            if split:
                under = fused(where_negative(entry, value), inputs, under)
        bit = least(add(bit, both(total, byte)), furthest)
        at = least(both(right(total, 8), position), end)
    store(found, 0, sums)
    store(below, 0, under)


@nb.njit(cache=True, nogil=True)
def block_few(
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
    x: F32,
    pairs: int,
    sums: F32,
) -> None:
    """`block_sums` for one or two pairs of inputs: a gather brings both of a pair.

    Args:
        x: float32, flat [pairs, positions, 2].
        sums: float32, flat [2, BLOCK, 2], written: for each pair and stream of the block.
    """
    bit, row_at = _begin(starts, row_class, piece, pieces, order, first)
    arrays = (words, bases, entries, classes, x, sums)
    if pairs == 1:
        _run_few(arrays, limit, bits, bit, row_at, span, 1)
    else:
        _run_few(arrays, limit, bits, bit, row_at, span, 2)


@nb.njit(inline="always")
def _run_few(
    arrays: tuple[Any, ...], limit: int, bits: int, bit: Any, row_at: Any, span: int, pairs: int
) -> None:
    words, bases, entries, classes, x, found = arrays
    end, furthest = splat(span), splat(32 * limit + 31)
    mask, byte, position = splat((1 << bits) - 1), splat(255), splat(0xFFFF)
    at, sums0, sums1 = splat(0), no_pairs(), no_pairs()
    second = x.size // 2
    while any_less(at, end):
        base = pick64(bases, add(row_at, gather(classes, at)))
        window = bits_at(words, bit)
        total = left8(at)
        for _ in range(32 // bits):
            entry = gather(entries, add(base, both(window, mask)))
            window, total = drop(window, entry), add(total, entry)
            place = both(right(total, 8), position)
            value = doubled(top_byte(entry))
            sums0 = fused(value, gather_pairs(x, 0, place), sums0)
            if pairs == 2:
                sums1 = fused(value, gather_pairs(x, second, place), sums1)
        bit = least(add(bit, both(total, byte)), furthest)
        at = least(both(right(total, 8), position), end)
    store(found, 0, sums0)
    store(found, 2 * BLOCK, sums1)


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
    bit, row_at = _begin(starts, row_class, piece, pieces, order, first)
    end, furthest = splat(span), splat(32 * limit + 31)
    mask, byte, position = splat((1 << bits) - 1), splat(255), splat(0xFFFF)
    at, to = splat(0), 0
    while any_less(at, end):
        base = pick64(bases, add(row_at, gather(classes, at)))
        window = bits_at(words, bit)
        total = left8(at)
        for _ in range(32 // bits):
            entry = gather(entries, add(base, both(window, mask)))
            window, total = drop(window, entry), add(total, entry)
            store(places, to, least(both(right(total, 8), position), end))
            store(values, to, top_byte(entry))
            to += BLOCK
        bit = least(add(bit, both(total, byte)), furthest)
        at = least(both(right(total, 8), position), end)
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
