"""Streams as a GPU reads them, one walk over each: codes of at most 7 bits instead of 8, and where
a stream may be cut into segments.

A file's codes have up to 8 bits, as rate asks for. In a kernel every bit of a table's index doubles
the memory that the lanes of a warp scatter their lookups over: with 7 bits a table is two words per
bank of shared memory, or two cache lines. So streams are rewritten when a model is loaded, symbol
by symbol; groups of symbols, and hence what table each one uses, stay. The words grow by 2 %.
Longer codes keep theirs.
"""

from dataclasses import dataclass, replace
from fractions import Fraction

import numba as nb
import numpy as np

from qmoe.codec import ParsedMatrix, Tables
from qmoe.codec.format.arrays import I32, I64, U8, U32
from qmoe.codec.format.huffman import canonical_codes, code_lengths, fill_lookup
from qmoe.errors import CorruptError

LONG, SHORT = 8, 7  # code limits: as stored, as rewritten; both give groups of four symbols
MAX_STEPS = 32767  # groups of a stream
_PADDING = 4  # words behind the streams, which decoders and this loop may touch


@dataclass(frozen=True)
class Recoding:
    """How the streams of a group are rewritten.

    Attributes:
        old, new: the group's tables as stored and as rewritten (maybe the same).
        codes: uint32 [tables, 2^L], for the next L bits of a stored stream the new code | its
            length << 16.
        growth: most new bits for an old one.
    """

    old: Tables
    new: Tables
    codes: U32
    growth: Fraction


def recoding(tables: Tables) -> Recoding:
    """SHORT codes where the group has LONG ones and few enough symbols; otherwise its own."""
    most = max(int((lengths > 0).sum()) for lengths in tables.lengths)
    short = tables.limit == LONG and most <= 1 << SHORT
    made, codes = [], np.empty((len(tables.lengths), 1 << tables.limit), np.uint32)
    for t, lengths in enumerate(tables.lengths):
        new = lengths
        if short and lengths.max() > SHORT:
            # a code of n bits says that its symbol has a share of about 2^-n
            share = np.where(lengths > 0, 1 << (LONG - lengths.astype(np.int64)), 0)
            new = code_lengths(share, SHORT)
        of_symbol = canonical_codes(new).astype(np.uint32) | new.astype(np.uint32) << 16
        codes[t] = of_symbol[fill_lookup(lengths, tables.limit) >> 4]
        made.append(new)
    growth = max(
        Fraction(int(new), int(old))
        for pair in zip(made, tables.lengths, strict=True)
        for new, old in zip(*pair, strict=True)
        if old
    )
    new_tables = replace(tables, limit=SHORT, lengths=tuple(made)) if short else tables
    return Recoding(tables, new_tables, codes, growth)


def rewrite(how: Recoding, m: ParsedMatrix, segments: int) -> tuple[U32, I64]:
    """A matrix's streams in the new codes, and their cuts.

    Args:
        how: of its group.
        m: the parsed matrix.
        segments: S, per stream.

    Returns:
        words, uint32 with two words of padding at least; cuts int64 [rows * pieces, S + 1, 3]: bit,
        position and groups before, at the start of each segment and at the end. A cut is at a
        group that starts with a symbol that advances, so that no weight belongs to two segments;
        missing segments are empty at the end.

    Raises:
        CorruptError: a stream does not end where it should, or has more than MAX_STEPS groups.
    """
    words = np.zeros(int(int(m.stream_start[-1]) * how.growth) // 32 + 1 + _PADDING, np.uint32)
    cuts = np.empty((m.rows * m.pieces, segments + 1, 3), np.int64)
    bad, bits = _walk(
        m.words.numpy().view(np.uint32),
        m.stream_start.numpy(),
        m.row_class.numpy(),
        m.slot_class.numpy(),
        how.old.table_of,
        how.old.lookup.ravel(),
        how.codes.ravel(),
        how.old.limit,
        words,
        cuts,
    )
    if bad >= 0:
        raise CorruptError(
            f"stream {bad} does not end at its last bit, or has more than {MAX_STEPS} groups"
        )
    return words[: (bits + 31) // 32 + _PADDING], cuts


@nb.njit(cache=True, nogil=True)
def _walk(
    words: U32,
    stream_start: I32,
    row_class: U8,
    slot_class: U8,
    table_of: U8,
    lookup: U32,
    codes: U32,
    limit: int,
    out: U32,
    cuts: I64,
) -> tuple[int, np.int64]:
    """Follows every stream, writes the new code of each symbol, and cuts it.

    Args:
        words, stream_start, row_class, slot_class: of a `ParsedMatrix`.
        table_of, lookup, limit: of its `Tables`, lookup flat; codes: flat.
        out: zeros, long enough, with two words to spare; written.
        cuts: written, see `rewrite`.

    Returns:
        -1, or the first stream that does not end at its end bit; and the bits written.
    """
    pieces, span = slot_class.shape[0], np.uint64(slot_class.shape[1] - 1)
    streams, segments = cuts.shape[0], cuts.shape[1] - 1
    latch, shift = 32 // limit, np.uint64(limit)
    one, five, six = np.uint64(1), np.uint64(5), np.uint64(63)
    low, word_bits = np.uint64(0xFFFFFFFF), np.uint64(32)
    mask = (one << shift) - one
    groups_at = np.empty((MAX_STEPS, 2), np.int64)  # bit, position where one starts
    # the accumulator holds the bits since the last whole word, so a word is written once
    held, filled, to = np.uint64(0), np.uint64(0), np.uint64(0)
    for stream in range(streams):
        a = np.uint64(row_class[stream // pieces])
        classes = slot_class[stream % pieces]
        bit, end = np.uint64(stream_start[stream]), np.uint64(stream_start[stream + 1])
        at, n = np.uint64(0), 0
        while at < span:
            if bit >= end or n >= groups_at.shape[0]:
                return stream, np.int64(0)
            base = np.uint64(table_of[a + np.uint64(classes[at])]) << shift
            word = bit >> five
            window = np.uint64(words[word]) | np.uint64(words[word + one]) << word_bits
            window >>= bit & np.uint64(31)
            begin = np.int64(to << five | filled)
            before = at
            for k in range(latch):
                place = base | (window & mask)
                entry, code = np.uint64(lookup[place]), np.uint64(codes[place])
                held |= (code & np.uint64(0xFFFF)) << filled
                filled += code >> np.uint64(16)
                length = entry & np.uint64(15)
                window >>= length
                bit += length
                at += (entry >> np.uint64(8)) & six
                if k == 0:
                    # sign: whether a cut is allowed here, since the first symbol advances
                    groups_at[n, 0] = begin if at > before else -begin - 1
                    groups_at[n, 1] = np.int64(before)
                if at >= span:
                    break
            if filled >= word_bits:
                out[to] = np.uint32(held & low)
                held >>= word_bits
                filled -= word_bits
                to += one
            n += 1
        if bit != end:
            return stream, np.int64(0)
        s = 0
        for g in range(n):
            if s < segments and g * segments >= s * n and (s == 0 or groups_at[g, 0] >= 0):
                begin = groups_at[g, 0]
                cuts[stream, s, 0] = begin if begin >= 0 else -begin - 1
                cuts[stream, s, 1], cuts[stream, s, 2] = groups_at[g, 1], g
                s += 1
        for rest in range(s, segments + 1):
            cuts[stream, rest, 0] = np.int64(to << five | filled)
            cuts[stream, rest, 1], cuts[stream, rest, 2] = np.int64(span), n
    out[to] = np.uint32(held & low)
    return -1, np.int64(to << five | filled)
