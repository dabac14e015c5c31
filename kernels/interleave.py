"""Compiled loops that arrange streams for a GPU: words interleaved by lane, and where the lanes of a
program start if streams are cut into segments. See `qmoe.kernels.pack`.
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
        cuts: int32 [S - 1, tiles], written: see `PackedProjection`, with the numbers of far starts
            counted from 0.
        starts: uint16 [(S - 1) * tiles, 32], written.
        far: int64 [(S - 1) * tiles, 32], the whole far starts are written in front.

    Returns:
        How many programs start far; the most groups with which a weight goes on behind a cut.
    """
    low, position = np.uint32((1 << MARK_BITS) - 1), np.uint32((1 << MARK_POSITION) - 1)
    shift, top = np.uint32(MARK_BITS), np.uint32(1 << 31)
    bits, places = np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    tiles, wide, over = steps.size, 0, 0
    for s in range(len(cuts)):
        for t in range(tiles):
            word, place, count = np.int64(1 << 30), np.int64(span), min(LANES, len(at) - LANES * t)
            for i in range(count):
                first, groups = at[LANES * t + i]
                n = (s + 1) * steps[t]
                if n >= groups:  # this stream has ended
                    bits[i], places[i] = -1, span
                    continue
                mark = marks[first + n]
                bits[i], places[i] = mark & low, mark >> shift & position
                word, place = min(word, bits[i] >> 5), min(place, places[i])
                more = 0
                while n + more < groups and marks[first + n + more] & top:
                    more += 1
                    before, now = marks[first + n + more - 1], span
                    if n + more < groups:
                        now = marks[first + n + more] >> shift & position
                    if before >> shift & position != now:
                        break
                over = max(over, more)
            near = True
            for i in range(count):
                if bits[i] < 0:
                    bits[i] = word << 5
                elif places[i] - place >= NEAR or bits[i] - (word << 5) > NEAR:
                    near = False
            if word == 1 << 30:  # all have ended
                word, bits[:count] = 0, 0
            program = s * tiles + t
            starts[program] = NEAR
            if near:
                cuts[s, t] = word << FAR_BITS | place
                for i in range(count):
                    step = NEAR if places[i] == span else places[i] - place
                    starts[program, i] = (bits[i] - (word << 5)) << 8 | step
            else:
                cuts[s, t] = wide - (1 << 31)
                far[wide] = span
                starts[program] = span
                for i in range(count):
                    far[wide, i] = bits[i] << FAR_BITS | places[i]
                    starts[program, i] = far[wide, i] & 0xFFFF
                wide += 1
    return wide, over
