"""Streams as a GPU reads them, one walk over each: codes of at most 7 bits instead of 8, and where
their groups of symbols begin, which is where a stream may be cut.

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
# a mark is a uint32: bits since the stream's start (at most 32 a group), position, and whether the
# group's first symbol goes on with the weight of the one in front of it
MARK_BITS, MARK_POSITION = 20, 11


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


@dataclass(frozen=True)
class Rewritten:
    """The streams of a matrix in the new codes; stream row * pieces + piece.

    Attributes:
        words: uint32, with two words of padding at least.
        starts: int64 [streams + 1], first bit of each; the last is the end.
        groups: int64 [streams], groups of symbols.
        marks: uint32, one a group, stream by stream: bits since the stream's start, position <<
            MARK_BITS, and the top bit for a first symbol that does not advance; empty if not asked
            for.
    """

    words: U32
    starts: I64
    groups: I64
    marks: U32


def rewrite(how: Recoding, m: ParsedMatrix, marked: bool) -> Rewritten:
    """A matrix's streams in the new codes.

    Args:
        how: of its group.
        m: the parsed matrix.
        marked: whether marks are wanted.

    Returns:
        The streams.

    Raises:
        CorruptError: a stream does not end where it should, or has more than MAX_STEPS groups.
    """
    bits = int(m.stream_start[-1])
    words = np.zeros(int(bits * how.growth) // 32 + 1 + _PADDING, np.uint32)
    streams = m.rows * m.pieces
    starts, groups = np.empty(streams + 1, np.int64), np.empty(streams, np.int64)
    # a symbol is a bit at least, and a group is full unless it is the last of its stream
    most = bits // (32 // how.old.limit) + streams if marked else 0
    marks = np.empty(most, np.uint32)
    bad = _walk(
        m.words.numpy().view(np.uint32),
        m.stream_start.numpy(),
        m.row_class.numpy(),
        m.slot_class.numpy(),
        how.old.table_of,
        how.old.lookup.ravel(),
        how.codes.ravel(),
        how.old.limit,
        words,
        starts,
        groups,
        marks,
    )
    if bad >= 0:
        raise CorruptError(
            f"stream {bad} does not end at its last bit, or has more than {MAX_STEPS} groups"
        )
    return Rewritten(words[: (starts[-1] + 31) // 32 + _PADDING], starts, groups, marks)


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
    starts: I64,
    groups: I64,
    marks: U32,
) -> int:
    """Follows every stream and writes the new code of each symbol.

    Args:
        words, stream_start, row_class, slot_class: of a `ParsedMatrix`.
        table_of, lookup, limit: of its `Tables`, lookup flat; codes: flat.
        out: zeros, long enough, with two words to spare; written.
        starts, groups, marks: written, see `Rewritten`; empty marks are left alone.

    Returns:
        -1, or the first stream that does not end at its end bit.
    """
    pieces, span = slot_class.shape[0], np.uint64(slot_class.shape[1] - 1)
    latch, shift, marked = 32 // limit, np.uint64(limit), marks.size > 0
    one, five, six = np.uint64(1), np.uint64(5), np.uint64(63)
    low, word_bits = np.uint64(0xFFFFFFFF), np.uint64(32)
    at_position, top = np.uint64(MARK_BITS), np.uint64(31)
    mask = (one << shift) - one
    # the accumulator holds the bits since the last whole word, so a word is written once
    held, filled, to, mark = np.uint64(0), np.uint64(0), np.uint64(0), 0
    for stream in range(groups.size):
        a = np.uint64(row_class[stream // pieces])
        classes = slot_class[stream % pieces]
        bit, end = np.uint64(stream_start[stream]), np.uint64(stream_start[stream + 1])
        at, n = np.uint64(0), 0
        first = to << five | filled
        while at < span:
            if bit >= end or n >= MAX_STEPS:
                return stream
            base = np.uint64(table_of[a + np.uint64(classes[at])]) << shift
            word = bit >> five
            window = np.uint64(words[word]) | np.uint64(words[word + one]) << word_bits
            window >>= bit & np.uint64(31)
            if marked:
                stays = np.uint64((lookup[base | (window & mask)] >> np.uint32(8)) & 63 == 0)
                begin = (to << five | filled) - first
                marks[mark] = np.uint32(begin | at << at_position | stays << top)
                mark += 1
            for _ in range(latch):
                place = base | (window & mask)
                entry, code = np.uint64(lookup[place]), np.uint64(codes[place])
                held |= (code & np.uint64(0xFFFF)) << filled
                filled += code >> np.uint64(16)
                length = entry & np.uint64(15)
                window >>= length
                bit += length
                at += (entry >> np.uint64(8)) & six
                if at >= span:
                    break
            if filled >= word_bits:
                out[to] = np.uint32(held & low)
                held >>= word_bits
                filled -= word_bits
                to += one
            n += 1
        if bit != end:
            return stream
        starts[stream], groups[stream] = np.int64(first), n
    starts[groups.size] = np.int64(to << five | filled)
    out[to] = np.uint32(held & low)
    return -1
