"""Length-limited canonical Huffman codes, least significant bit first.

Code lengths come from the package-merge algorithm (Larmore and Hirschberg, "A fast algorithm for
optimal length-limited Huffman codes", JACM 1990). Codes are canonical: shorter first, equal lengths
by symbol number; the code's first bit is its most significant one and is the first in the stream,
hence stored codes are bit-reversed. Every code is *complete* (Kraft sum exactly 1), so that each of
the 2^L entries of a decoder's lookup table is valid whatever the stream holds.
"""

import numba as nb
import numpy as np

from qmoe.codec.format.arrays import I64, U8, U32

MAX_LENGTH = 12  # bits; lookup tables have at most 4096 entries


@nb.njit(cache=True, nogil=True)
def _sort_by_count(order: I64, counts: I64) -> None:
    """Shell sort by (count, symbol). numba's own stable sort takes seconds to compile."""
    gap = 1
    while 3 * gap < order.size:
        gap = 3 * gap + 1
    while gap:
        for i in range(gap, order.size):
            symbol, k = order[i], i
            while k >= gap:
                other = order[k - gap]
                less = counts[symbol] - counts[other]
                if less > 0 or (less == 0 and symbol > other):
                    break
                order[k] = other
                k -= gap
            order[k] = symbol
        gap //= 3


@nb.njit(cache=True, nogil=True)
def code_lengths(counts: I64, limit: int) -> U8:
    """Optimal code lengths of at most `limit` bits.

    Args:
        counts: int64 [n], n <= 2^limit, not negative; a symbol with count 0 gets no code.
        limit: largest code length in bits.

    Returns:
        uint8 [n] with Kraft sum 1, 0 = unused. A lone symbol is joined by a dummy (symbol 0 or 1),
        both of one bit; with no symbol at all, symbols 0 and 1 get one bit. n must be at least 2.
    """
    n = counts.size
    lengths = np.zeros(n, np.uint8)
    order = np.empty(n, np.int64)
    used = 0
    for symbol in range(n):
        if counts[symbol] > 0:
            order[used] = symbol
            used += 1
    _sort_by_count(order[:used], counts)
    if used < 2:
        lone = order[0] if used == 1 else 0
        lengths[lone] = 1
        lengths[1 if lone == 0 else 0] = 1
        return lengths
    leaf = counts[order[:used]]
    is_leaf = np.zeros((limit, 2 * used), np.bool_)
    previous = np.zeros(2 * used, np.int64)
    current = np.zeros(2 * used, np.int64)
    size = 0
    for level in range(limit):  # the list of a level: leaves merged with pairs of the level before
        pairs = size // 2
        i = j = k = 0
        while i < used or j < pairs:
            pair = previous[2 * j] + previous[2 * j + 1] if j < pairs else 0
            if j >= pairs or (i < used and leaf[i] <= pair):
                current[k] = leaf[i]
                is_leaf[level, k] = True
                i += 1
            else:
                current[k] = pair
                j += 1
            k += 1
        size = k
        previous, current = current, previous
    take = 2 * used - 2
    for level in range(limit - 1, -1, -1):  # a leaf taken at a level is one bit longer
        leaves = 0
        for k in range(take):
            if is_leaf[level, k]:
                leaves += 1
        for i in range(leaves):
            lengths[order[i]] += 1
        take = 2 * (take - leaves)
    return lengths


@nb.njit(cache=True, nogil=True)
def canonical_codes(lengths: U8) -> U32:
    """Codes of given lengths, bit-reversed so that they are written least significant bit first.

    Args:
        lengths: uint8 [n], a complete code.

    Returns:
        uint32 [n]; 0 for unused symbols.
    """
    codes = np.zeros(lengths.size, np.uint32)
    code = 0
    for length in range(1, MAX_LENGTH + 1):
        code <<= 1
        for symbol in range(lengths.size):
            if lengths[symbol] == length:
                reversed_code = 0
                for bit in range(length):
                    reversed_code |= ((code >> bit) & 1) << (length - 1 - bit)
                codes[symbol] = reversed_code
                code += 1
    return codes


@nb.njit(cache=True, nogil=True)
def fill_lookup(lengths: U8, bits: int) -> U32:
    """Decoding table: the next `bits` bits of the stream -> symbol << 4 | code length.

    Args:
        lengths: uint8 [n], a complete code with lengths <= bits.
        bits: index width.

    Returns:
        uint32 [2^bits].
    """
    codes = canonical_codes(lengths)
    table = np.zeros(1 << bits, np.uint32)
    for symbol in range(lengths.size):
        length = int(lengths[symbol])
        if length:
            for high in range(1 << (bits - length)):
                table[codes[symbol] | (high << length)] = symbol << 4 | length
    return table


def is_complete(lengths: U8, limit: int) -> bool:
    """Whether the lengths are those of a complete prefix code of at most `limit` bits."""
    used = lengths[lengths > 0].astype(np.int64)
    if not used.size or int(used.max()) > limit:
        return False
    return int((1 << (limit - used)).sum()) == 1 << limit
