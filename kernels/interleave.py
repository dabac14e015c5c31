"""Compiled loops that arrange streams for a GPU: words interleaved by lane, and where the lanes of
streams that are cut start. See `qmoe.kernels.pack`.
"""

import numba as nb
import numpy as np
from numpy.typing import NDArray

from qmoe.codec.format.arrays import I32, I64, U32
from qmoe.kernels.recode import MARK_BITS, MARK_POSITION

LANES = 32
BLOCK_TILES = 4  # neighbouring tiles that are cut after the same number of groups
NEAR = 255  # offsets of a near start are below, this one stands for the stream's end
FAR_BITS = 11  # of a far start: its position is in the low bits


@nb.njit(cache=True, nogil=True)
def interleave(words: U32, starts: I64, first: I64, out: I32) -> None:
    """Copies streams so that word k of lane l of tile t lies at out[first[t] + 32 k + l].

    Args:
        words: source with at least one word of padding.
        starts: int64 [streams, 2], first and end bit of each stream, in the order of the lanes.
        first: int64 [tiles], first word of each tile in `out`, which is long enough and zero.
    """
    for i in range(len(starts)):
        begin, end = starts[i]
        word, shift, count = begin >> 5, np.uint64(begin & 31), (end - begin + 31) >> 5
        to = first[i // LANES] + i % LANES
        for k in range(count):
            pair = np.uint64(words[word + k]) | np.uint64(words[word + k + 1]) << np.uint64(32)
            out[to + LANES * k] = np.int32(np.uint32(pair >> shift))


@nb.njit(cache=True, nogil=True)
def _position(mark: np.uint32) -> np.int64:
    """Position before a group."""
    return np.int64(mark >> np.uint32(MARK_BITS) & np.uint32((1 << MARK_POSITION) - 1))


@nb.njit(cache=True, nogil=True)
def _goes_on(marks: U32, n: int, end: int, span: int) -> int:
    """Groups from mark n on in which the weight before it goes on; the stream ends at `end`."""
    more = 0
    while n + more < end and marks[n + more] >> np.uint32(31):
        more += 1
        now = _position(marks[n + more]) if n + more < end else span
        if now != _position(marks[n]):
            break
    return more


@nb.njit(cache=True, nogil=True)
def cut(
    marks: U32, at: I64, steps: I64, span: int, cuts: I32, starts: NDArray[np.uint16], far: I64
) -> tuple[int, int]:
    """Starts of the segments 1..S-1 of the streams of a piece.

    Args:
        marks: of a `Rewritten`.
        at: int64 [rows, 2], first mark and number of groups of each stream, in the order of the
            lanes.
        steps: int64 [tiles], groups of an inner segment.
        span: of the matrix.
        cuts: int32 [S - 1, tiles], written: see `PackedProjection`, with the rows of far starts
            counted from 0.
        starts: uint16 [(S - 1) * tiles, 32], written.
        far: int64 [(S - 1) * tiles, 32]; far starts are written whole, in front.

    Returns:
        How many programs start far; the most groups in which a weight goes on behind a cut.
    """
    bits, places = np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    low, tiles, wide, over = np.uint32((1 << MARK_BITS) - 1), steps.size, 0, 0
    for program in range(cuts.size):
        s, t = program // tiles, program % tiles
        bits[:], places[:] = -1, span  # as of a stream that has ended
        bit, place = np.int64(1 << MARK_BITS), np.int64(span)
        for i in range(min(LANES, len(at) - LANES * t)):
            first, groups = at[LANES * t + i]
            n = (s + 1) * steps[t]
            if n < groups:
                mark = marks[first + n]
                bits[i], places[i] = mark & low, _position(mark)
                bit, place = min(bit, bits[i]), min(place, places[i])
                over = max(over, _goes_on(marks, first + n, first + groups, span))
        word = bit >> 5 if place < span else np.int64(0)
        bits = np.where(bits < 0, word << 5, bits)
        live = places < span
        step = np.where(live, places - place, NEAR)
        if not (live & ((step >= NEAR) | (bits - (word << 5) > NEAR))).any():
            cuts[s, t] = word << FAR_BITS | place
            starts[program] = (bits - (word << 5)) << 8 | step
        else:
            cuts[s, t] = wide - (1 << 31)
            far[wide] = bits << FAR_BITS | places
            starts[program] = far[wide] & 0xFFFF
            wide += 1
    return wide, over
