"""Finding where streams start: only the length of every 64th run of streams is stored, the rest follows from decoding."""

import numba as nb
import numpy as np
from numpy.typing import NDArray

from qmoe.codec.geometry import Geometry
from qmoe.codec.tables import SEGMENT, Tables
from qmoe.errors import CorruptError

U8, U32, I32, I64 = NDArray[np.uint8], NDArray[np.uint32], NDArray[np.int32], NDArray[np.int64]


def find_starts(
    tables: Tables, words: U32, segment_bits: I64, row_class: U8, shape: Geometry
) -> I32:
    """Bit at which every stream starts, int32 [rows * pieces + 1].

    Args:
        tables: of the group.
        words: payload with at least two padding words.
        segment_bits: int64 [segments], lengths of runs of SEGMENT streams; their sum fits in the payload.
        row_class: uint8 [rows].
        shape: geometry of the matrix.

    Raises:
        CorruptError: a run of streams does not end exactly at its stored length, or a stream moves back before its first column.
    """
    starts = np.empty(row_class.size * shape.pieces + 1, np.int32)
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(segment_bits)])
    bad = _walk(
        words, bounds, row_class, shape.slot_class, tables.table_of, tables.lookup, tables.latch, SEGMENT, starts
    )
    if bad >= 0:
        raise CorruptError(
            f"streams {bad * SEGMENT} to {min((bad + 1) * SEGMENT, starts.size - 1) - 1} do not end at bit {bounds[bad + 1]}"
        )
    return starts


@nb.njit(cache=True, nogil=True)
def _walk(
    words: U32,
    bounds: I64,
    row_class: U8,
    slot_class: U8,
    table_of: U8,
    lookup: U32,
    latch: int,
    per_segment: int,
    starts: I32,
) -> int:
    pieces, span = slot_class.shape[0], slot_class.shape[1] - 1
    streams = starts.size - 1
    mask = np.uint64(lookup.shape[1] - 1)
    for segment in range(bounds.size - 1):
        bit, end = bounds[segment], bounds[segment + 1]
        for stream in range(segment * per_segment, min((segment + 1) * per_segment, streams)):
            starts[stream] = bit
            a = int(row_class[stream // pieces])
            classes = slot_class[stream % pieces]
            at = 0
            while at < span:
                if bit >= end:
                    return segment
                table = lookup[table_of[a + classes[at]]]
                window = np.uint64(words[bit >> 5]) | np.uint64(words[(bit >> 5) + 1]) << np.uint64(32)
                window >>= np.uint64(bit & 31)
                for _ in range(latch):
                    entry = np.int64(table[window & mask])
                    length = entry & 15
                    window >>= np.uint64(length)
                    bit += length
                    at += (entry >> 8) & 63
                    if at >= span:
                        break
        if bit != end:
            return segment
    starts[streams] = bounds[-1]
    return -1
