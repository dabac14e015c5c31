"""Shorter lookup tables for a GPU: the same symbols with codes of at most 7 bits instead of 8.

A file's codes have up to 8 bits, as rate asks for. In a kernel every bit of a table's index doubles
the memory that the lanes of a warp scatter their lookups over: with 7 bits a table is two words per
bank of shared memory, or two cache lines. So streams are rewritten when a model is loaded, symbol
by symbol; groups of symbols, and hence what table each one uses, stay. The words grow by 2 %.
"""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numba as nb
import numpy as np
import torch

from qmoe.codec import ParsedMatrix, Tables
from qmoe.codec.decoder.matrix import PADDING_WORDS
from qmoe.codec.format.arrays import I32, U8, U32
from qmoe.codec.format.huffman import canonical_codes, code_lengths, fill_lookup
from qmoe.errors import CorruptError

LONG, SHORT = 8, 7  # code limits: as stored, as rewritten; both give groups of four symbols
PADDING = 4  # words behind the streams, which the loops of this package may touch


def shorten(matrices: Sequence[tuple[Tables, ParsedMatrix]]) -> list[tuple[Tables, ParsedMatrix]]:
    """Rewrites the matrices whose tables allow it; the others come back as they are.

    Args:
        matrices: (group header, parsed matrix); matrices of a group share the Tables object, before
            and after.

    Raises:
        CorruptError: a stream does not end where it should.
    """
    made: dict[int, tuple[Tables, U32] | None] = {}
    out = []
    for tables, matrix in matrices:
        if id(tables) not in made:
            made[id(tables)] = _short_tables(tables)
        short = made[id(tables)]
        out.append(
            (tables, matrix) if short is None else (short[0], _rewrite(tables, *short, matrix))
        )
    return out


def _short_tables(tables: Tables) -> tuple[Tables, U32] | None:
    """Tables of SHORT bits, and for each table and LONG bits of a stream the new code | its length
    << 8 of the symbol there. None if it is not a group of LONG bits or has too many symbols.
    """
    most = max(int((lengths > 0).sum()) for lengths in tables.lengths)
    if tables.limit != LONG or most > 1 << SHORT:
        return None
    shorter, codes = [], np.empty((len(tables.lengths), 1 << LONG), np.uint32)
    for t, lengths in enumerate(tables.lengths):
        # a code of n bits says that its symbol has a share of about 2^-n
        share = np.where(lengths > 0, 1 << (LONG - lengths.astype(np.int64)), 0)
        new = lengths if lengths.max() <= SHORT else code_lengths(share, SHORT)
        of_symbol = canonical_codes(new) | new.astype(np.uint32) << 8
        codes[t] = of_symbol[fill_lookup(lengths, LONG) >> 4]
        shorter.append(new)
    return replace(tables, limit=SHORT, lengths=tuple(shorter)), codes


def _rewrite(tables: Tables, short: Tables, codes: U32, m: ParsedMatrix) -> ParsedMatrix:
    growth = max(
        Fraction(int(new), int(old))
        for pair in zip(short.lengths, tables.lengths, strict=True)
        for new, old in zip(*pair, strict=True)
        if old
    )
    words = np.zeros(int(int(m.stream_start[-1]) * growth) // 32 + 1 + PADDING, np.uint32)
    start = np.zeros(m.stream_start.numel(), np.int32)
    bad = _recode(
        m.padded_words(PADDING),
        m.stream_start.numpy(),
        m.row_class.numpy(),
        m.slot_class.numpy(),
        tables.table_of,
        tables.lookup,
        codes,
        words,
        start,
    )
    if bad >= 0:
        raise CorruptError(f"stream {bad} does not end at its last bit")
    words = words[: (int(start[-1]) + 31) // 32 + PADDING_WORDS].view(np.int32)
    return replace(m, words=torch.from_numpy(words), stream_start=torch.from_numpy(start))


@nb.njit(cache=True, nogil=True)
def _recode(
    words: U32,
    stream_start: I32,
    row_class: U8,
    slot_class: U8,
    table_of: U8,
    lookup: U32,
    codes: U32,
    out: U32,
    out_start: I32,
) -> int:
    """Follows every stream and writes the new code of each symbol.

    Args:
        words, stream_start, row_class, slot_class: of a `ParsedMatrix`.
        table_of, lookup: of its `Tables` of LONG bits.
        codes: uint32 [tables, 2^LONG], code | length << 8.
        out: zeros, long enough, with two words to spare; written.
        out_start: as stream_start, written.

    Returns:
        -1, or the first stream that does not end at its end bit.
    """
    pieces, span = slot_class.shape[0], slot_class.shape[1] - 1
    to = 0
    for stream in range(out_start.size - 1):
        a, classes = int(row_class[stream // pieces]), slot_class[stream % pieces]
        bit, end, at = int(stream_start[stream]), int(stream_start[stream + 1]), 0
        while at < span:
            if bit >= end:
                return stream
            t = int(table_of[a + classes[at]])
            window = np.uint64(words[bit >> 5]) | np.uint64(words[(bit >> 5) + 1]) << np.uint64(32)
            window >>= np.uint64(bit & 31)
            for _ in range(32 // LONG):
                index = np.int64(window & np.uint64((1 << LONG) - 1))
                entry, code = int(lookup[t, index]), int(codes[t, index])
                shifted = np.uint64(code & 255) << np.uint64(to & 31)
                out[to >> 5] |= np.uint32(shifted & np.uint64(0xFFFFFFFF))
                out[(to >> 5) + 1] |= np.uint32(shifted >> np.uint64(32))
                to += code >> 8
                window >>= np.uint64(entry & 15)
                bit += entry & 15
                at += (entry >> 8) & 63
                if at >= span:
                    break
        if bit != end:
            return stream
        out_start[stream + 1] = to
    return -1
