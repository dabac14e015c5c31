"""Where streams start: one length per 64 streams is stored, the rest follows from decoding."""

import numba as nb
import numpy as np

from qmoe.codec.format.arrays import I32, I64, U8, U16, U32
from qmoe.codec.format.geometry import Geometry
from qmoe.codec.format.tables import RUN, Tables
from qmoe.errors import CorruptError


def find_starts(
    tables: Tables, words: U32, run_bits: I64, row_class: U8, shape: Geometry
) -> tuple[I32, U16]:
    """Bit at which every stream starts, int32 [rows * pieces + 1], and how many groups of symbols
    each has, uint16 [rows * pieces].

    Args:
        tables: of the group.
        words: payload with at least two padding words.
        run_bits: int64 [runs], lengths of runs of RUN streams, within the payload.
        row_class: uint8 [rows].
        shape: geometry of the matrix.

    Raises:
        CorruptError: a run of streams does not end exactly at its stored length.
    """
    starts = np.empty(row_class.size * shape.pieces + 1, np.int32)
    groups = np.empty(starts.size - 1, np.uint16)
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(run_bits)])
    classes = shape.slot_class
    lookup = tables.lookup.ravel()
    of = (tables.table_of, lookup, tables.limit)
    bad = _walk(words, bounds, row_class, classes, *of, starts, groups)
    if bad >= 0:
        last = min((bad + 1) * RUN, starts.size - 1) - 1
        raise CorruptError(f"streams {bad * RUN} to {last} do not end at bit {bounds[bad + 1]}")
    return starts, groups


@nb.njit(cache=True, nogil=True)
def _walk(
    words: U32,
    bounds: I64,
    row_class: U8,
    slot_class: U8,
    table_of: U8,
    lookup: U32,
    limit: int,
    starts: I32,
    groups: U16,
) -> int:
    """Fills starts and groups; returns -1 or the first run of streams that does not end where it
    should."""
    pieces, span = slot_class.shape[0], np.uint64(slot_class.shape[1] - 1)
    streams = starts.size - 1
    one, word_bits, shift = np.uint64(1), np.uint64(32), np.uint64(limit)
    mask = (one << shift) - one
    # Only the first stream of a run has a stored start; the others begin where the one before ends,
    # and that is known when all its symbols are looked up. Values do not matter here.
    for run in range(bounds.size - 1):
        bit, end = np.uint64(bounds[run]), np.uint64(bounds[run + 1])
        for stream in range(run * RUN, min((run + 1) * RUN, streams)):
            starts[stream] = bit
            a = np.uint64(row_class[stream // pieces])
            classes = slot_class[stream % pieces]
            at = count = np.uint64(0)
            while at < span:
                if bit >= end:  # before the read: a lying length must not lead out of the words
                    return run
                count += one
                base = np.uint64(table_of[a + np.uint64(classes[at])]) << shift
                word = bit >> np.uint64(5)
                window = np.uint64(words[word]) | np.uint64(words[word + one]) << word_bits
                window >>= bit & np.uint64(31)
                for _ in range(32 // limit):
                    entry = np.uint64(lookup[base | (window & mask)])
                    length = entry & np.uint64(15)
                    window >>= length
                    bit += length
                    at += (entry >> np.uint64(8)) & np.uint64(63)
                    if at >= span:  # the group's other codes belong to the next stream
                        break
            groups[stream] = count
        if bit != end:  # streams that end early are as wrong as those that end late
            return run
    starts[streams] = bounds[-1]
    return -1
