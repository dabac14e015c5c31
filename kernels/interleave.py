"""Compiled loops that re-arrange streams for a GPU: where to cut them, and words interleaved by
lane. See `qmoe.kernels.pack`.
"""

import numba as nb
import numpy as np

from qmoe.codec.format.arrays import I32, I64, U8, U32


@nb.njit(cache=True, nogil=True)
def _group(
    words: U32, bit: int, at: int, table: int, lookup: U32, limit: int, latch: int, span: int
) -> tuple[int, int, int]:
    """Follows one group of symbols. Returns (bit, position, advance of the first symbol)."""
    window = np.uint64(words[bit >> 5]) | np.uint64(words[(bit >> 5) + 1]) << np.uint64(32)
    window >>= np.uint64(bit & 31)
    first = -1
    for _ in range(latch):
        entry = np.int64(lookup[(table << limit) | np.int64(window & np.uint64((1 << limit) - 1))])
        length, advance = int(entry & 15), int((entry >> 8) & 63)
        window >>= np.uint64(length)
        bit += length
        at += advance
        if first < 0:
            first = advance
        if at >= span:
            break
    return bit, at, first


@nb.njit(cache=True, nogil=True)
def cut_streams(
    words: U32,
    stream_start: I32,
    row_class: U8,
    slot_class: U8,
    table_of: U8,
    lookup: U32,
    limit: int,
    cuts: I64,
) -> int:
    """Finds where each stream may be cut into segments of about equal numbers of groups.

    A cut is a bit and a position at which a group starts with a symbol that advances, so that no
    weight belongs to two segments.

    Args:
        words, stream_start, row_class, slot_class: of a `ParsedMatrix`.
        table_of, lookup, limit: of its `Tables`, lookup flat.
        cuts: int64 [rows * pieces, segments + 1, 3], written: bit, position, groups before, at the
            start of each segment and at the end;
            missing segments are empty at the end.

    Returns:
        -1, or the first stream that does not end at its end bit.
    """
    streams, segments = cuts.shape[0], cuts.shape[1] - 1
    pieces, span = slot_class.shape[0], slot_class.shape[1] - 1
    latch = 32 // limit
    for stream in range(streams):
        a = int(row_class[stream // pieces])
        classes = slot_class[stream % pieces]
        groups, passes = 0, 1 if segments == 1 else 2
        for p in range(passes):
            bit, end, at, n, s = int(stream_start[stream]), int(stream_start[stream + 1]), 0, 0, 0
            while at < span:
                if bit >= end:
                    return stream
                after, to, advance = _group(
                    words, bit, at, int(table_of[a + classes[at]]), lookup, limit, latch, span
                )
                if (
                    p == passes - 1
                    and s < segments
                    and n * segments >= s * groups
                    and (advance > 0 or s == 0)
                ):
                    cuts[stream, s, 0], cuts[stream, s, 1], cuts[stream, s, 2] = bit, at, n
                    s += 1
                bit, at, n = after, to, n + 1
            if bit != end:
                return stream
            groups = n
            for rest in range(s, segments + 1):
                cuts[stream, rest, 0], cuts[stream, rest, 1], cuts[stream, rest, 2] = bit, span, n
    return -1


@nb.njit(cache=True, nogil=True)
def interleave(words: U32, start: I64, count: I64, base: int, out: I32) -> None:
    """Copies bit strings so that word k of lane l lies at out[base + 32 * k + l].

    Args:
        words: source with at least one word of padding.
        start, count: int64 [lanes <= 32], first bit and number of bits of each lane.
        base: first word in `out`, which is long enough and zero.
    """
    for lane in range(start.size):
        word, shift = start[lane] >> 5, start[lane] & 31
        for k in range((count[lane] + 31) >> 5):
            pair = np.uint64(words[word + k]) | np.uint64(words[word + k + 1]) << np.uint64(32)
            out[base + 32 * k + lane] = np.int32(np.uint32(pair >> np.uint64(shift)))
