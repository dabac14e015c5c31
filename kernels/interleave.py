"""Compiled loops that arrange streams for a GPU: which lanes make a program, and words interleaved
by lane. See `qmoe.kernels.pack`.
"""

import numba as nb
import numpy as np

from qmoe.codec.format.arrays import I32, I64, U32

LANES = 32
AHEAD = 2  # words that a lane loads before it looks


@nb.njit(cache=True, nogil=True)
def measure(cuts: I64, order: I64, records: I64) -> int:
    """Words and groups of the programs of one piece and segment.

    Args:
        cuts: int64 [rows, 2, 3], bit, position and groups at a segment's start and end.
        order: rows by program: LANES of each.
        records: int64 [tiles, 2], written: words a lane, most groups.

    Returns:
        Words of all programs.
    """
    total = 0
    for t in range(records.shape[0]):
        words, groups = AHEAD, 0
        for row in order[t * LANES : (t + 1) * LANES]:
            words = max(words, (cuts[row, 1, 0] - cuts[row, 0, 0] + 31) >> 5)
            groups = max(groups, cuts[row, 1, 2] - cuts[row, 0, 2])
        records[t, 0], records[t, 1] = words, groups
        total += LANES * words
    return total


@nb.njit(cache=True, nogil=True)
def interleave(words: U32, cuts: I64, order: I64, first: I64, out: I32) -> None:
    """Copies the segments of the programs of one piece so that word k of lane l of program t lies
    at out[first[t] + 32 k + l].

    Args:
        words: source with at least one word of padding.
        cuts, order: as in `measure`.
        first: int64 [tiles], first word of each program in `out`, which is long enough and zero.
    """
    for i in range(order.size):
        begin, end = cuts[order[i], 0, 0], cuts[order[i], 1, 0]
        word, shift, count = begin >> 5, np.uint64(begin & 31), (end - begin + 31) >> 5
        to = first[i // LANES] + i % LANES
        for k in range(count):
            pair = np.uint64(words[word + k]) | np.uint64(words[word + k + 1]) << np.uint64(32)
            out[to + LANES * k] = np.int32(np.uint32(pair >> shift))
