"""Compiled loops of the encoder: weights -> non-zeros -> symbols -> words of every stream.

Non-zeros of a stream are (position, value) pairs; symbols are table << 12 | symbol, the last of a
stream being table << 12 | columns left, for which the shortest code with that advance or more is
written.
"""

import numba as nb
import numpy as np

from qmoe.codec.format.arrays import I8, I64, U8, U16, U32


@nb.njit(cache=True, nogil=True)
def nonzeros(codes: I8, slots: U16, position: U16, value: I8, start: I64) -> None:
    """Lists the non-zeros of every stream.

    Args:
        codes: int8 [rows, cols].
        slots: uint16 [pieces, n], columns of each piece; `cols` at the end of a piece with fewer.
        position, value: outputs, one more than the number of non-zeros is enough; zero-based column
            of the piece.
        start: output int64 [rows * pieces + 1], first non-zero of each stream.
    """
    rows, cols = codes.shape
    pieces, length = slots.shape
    n = np.uint64(0)
    for i in range(rows):
        line = codes[i]
        for p in range(pieces):
            start[i * pieces + p] = n
            slot = slots[p]
            end = length
            while end > 0 and slot[end - 1] == cols:
                end -= 1
            for k in range(end):
                q = line[slot[k]]
                # written always, kept only if it is no zero: a branch on q would be guessed wrong
                position[n] = k
                value[n] = q
                n += np.uint64(q != 0)
    start[rows * pieces] = n


@nb.njit(cache=True, nogil=True)
def count_contexts(
    position: U16, value: I8, start: I64, row_class: U8, slot_class: U8, histogram: I64
) -> None:
    """Adds the non-zeros of a matrix to histogram int64 [contexts * 256]: context << 8 | q +
    128."""
    pieces = slot_class.shape[0]
    for stream in range(start.size - 1):
        a = np.uint64(row_class[stream // pieces])
        classes = slot_class[stream % pieces]
        for k in range(start[stream], start[stream + 1]):
            context = a + np.uint64(classes[position[k]])
            histogram[context << np.uint64(8) | np.uint64(np.uint8(value[k]) ^ np.uint8(128))] += 1


@nb.njit(cache=True, nogil=True)
def parse(
    position: U16,
    value: I8,
    start: I64,
    row_class: U8,
    slot_class: U8,
    table_of: U8,
    kinds: I64,
    escapes: int,
    latch: int,
    symbols: U16,
    symbol_start: I64,
    counts: I64,
) -> np.int64:
    """Turns non-zeros into symbols.

    Args:
        position, value, start: of `nonzeros`.
        row_class: uint8 [rows]; slot_class: uint8 [pieces, span + 1].
        table_of: uint8 [contexts].
        kinds: int64 [tables, 2], R and V.
        escapes: X.
        latch: symbols that share a table.
        symbols: output uint16, large enough for each weight, its escapes, and one more per stream.
        symbol_start: output int64 [streams + 1].
        counts: int64 [tables << 12], symbol counts are added; a stream's last symbol counts as R
            zeros.

    Returns:
        Number of symbols.
    """
    pieces, span = slot_class.shape[0], slot_class.shape[1] - 1
    n = np.uint64(0)
    one = np.uint64(1)
    for stream in range(start.size - 1):
        symbol_start[stream] = n
        a = np.uint64(row_class[stream // pieces])
        classes = slot_class[stream % pieces]
        left = sign = 0
        at = rest = base = run = top = np.int64(0)
        k, stop = np.uint64(start[stream]), np.uint64(start[stream + 1])
        while True:
            if left == 0:  # a new group: its table follows from the position where it begins
                table = np.uint64(table_of[a + np.uint64(classes[np.uint64(at)])])
                run, top = kinds[table, 0], kinds[table, 1]
                base = np.int64(table) << 12
                left = latch
            left -= 1
            if rest > 0:  # of a value above V: escapes of powers of two, the largest first
                e = 0
                while e + 1 < escapes and (2 << e) <= rest:
                    e += 1
                rest -= 1 << e
                symbol = base + 1 + 2 * (run * top + e) + sign
            elif k < stop:
                zeros = np.int64(position[k]) - at
                if zeros >= run:  # R zeros and no value
                    symbol = base
                    at += run
                else:
                    q = np.int64(value[k])
                    sign = 1 if q < 0 else 0
                    size = abs(q)
                    rest = max(size - top, np.int64(0))
                    symbol = base + 1 + 2 * (zeros * top + size - rest - 1) + sign
                    at += zeros + 1
                    k += one
            elif span - at > run:  # zeros up to the end
                symbol = base
                at += run
            else:
                # The last symbol may be any that reaches the end; which is the shortest is known
                # when the code lengths are, so `emit` chooses. Counted as R zeros until then.
                symbols[n] = base + span - at
                counts[np.uint64(base)] += 1
                n += one
                break
            symbols[n] = symbol
            counts[np.uint64(symbol)] += 1
            n += one
    symbol_start[start.size - 1] = n
    return np.int64(n)


@nb.njit(cache=True, nogil=True)
def emit(
    symbols: U16, symbol_start: I64, codes: U32, last_symbol: U16, words: U32, bits: I64
) -> np.int64:
    """Writes symbols as code words.

    Args:
        symbols, symbol_start: of `parse`.
        codes: uint32 [tables << 12], code << 4 | length of every symbol.
        last_symbol: uint16 [tables << 12], table << 12 | symbol to write for table << 12 | columns
            left.
        words: output, long enough for 12 bits a symbol; every word before the returned bit is set.
        bits: output int64 [streams + 1], bit at which each stream starts.

    Returns:
        Number of bits.
    """
    word, held, buffer = np.uint64(0), np.uint64(0), np.uint64(0)
    whole, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    for stream in range(symbol_start.size - 1):
        bits[stream] = np.int64(whole * word + held)
        stop = symbol_start[stream + 1] - 1
        for k in range(symbol_start[stream], stop + 1):
            symbol = symbols[k]
            if k == stop:
                symbol = last_symbol[symbol]
            entry = np.uint64(codes[symbol])
            # at most 31 held bits and a code of 12 fit in the 64 of the buffer
            buffer |= (entry >> np.uint64(4)) << held
            held += entry & np.uint64(15)
            if held >= whole:
                words[word] = np.uint32(buffer & low)
                buffer >>= whole
                held -= whole
                word += np.uint64(1)
    words[word] = np.uint32(buffer & low)
    bits[symbol_start.size - 1] = np.int64(whole * word + held)
    return np.int64(whole * word + held)
