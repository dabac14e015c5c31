"""Compiled loops of the encoder: weights -> non-zeros -> symbols -> words. One stream is one piece of one row.

Non-zeros of a stream are (position, value) pairs; symbols are table << 12 | symbol, the last of a stream being
table << 12 | columns left, for which the shortest code with that advance or more is written.
"""

import numba as nb
import numpy as np
from numpy.typing import NDArray

I8, U8, U16, U32 = NDArray[np.int8], NDArray[np.uint8], NDArray[np.uint16], NDArray[np.uint32]
I32, I64 = NDArray[np.int32], NDArray[np.int64]


@nb.njit(cache=True, nogil=True)
def nonzeros(codes: I8, slots: I32, position: U16, value: I8, start: I64) -> int:
    """Lists the non-zeros of every stream.

    Args:
        codes: int8 [rows, cols].
        slots: int32 [pieces, span + 1] of `Geometry`.
        position, value: outputs, one more than the number of non-zeros is enough; zero-based column of the piece.
        start: output int64 [rows * pieces + 1], first non-zero of each stream.

    Returns:
        Number of non-zeros.
    """
    rows, cols = codes.shape
    pieces, last = slots.shape[0], slots.shape[1] - 2
    n = 0
    for i in range(rows):
        line = codes[i]
        for p in range(pieces):
            start[i * pieces + p] = n
            slot = slots[p]
            end = last
            while end > 0 and slot[end] == cols:
                end -= 1
            for k in range(end):
                q = line[slot[k + 1]]
                position[n] = k
                value[n] = q
                n += q != 0
    start[rows * pieces] = n
    return n


@nb.njit(cache=True, nogil=True)
def count_contexts(
    position: U16, value: I8, start: I64, row_class: U8, slot_class: U8, histogram: I64
) -> None:
    """Adds the non-zeros of a matrix to histogram int64 [contexts, 256] (q at index q + 128)."""
    pieces = slot_class.shape[0]
    for stream in range(start.size - 1):
        a = int(row_class[stream // pieces])
        classes = slot_class[stream % pieces]
        for k in range(start[stream], start[stream + 1]):
            histogram[a + classes[position[k]], int(value[k]) + 128] += 1


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
) -> int:
    """Turns non-zeros into symbols.

    Args:
        position, value, start: of `nonzeros`.
        row_class: uint8 [rows]; slot_class: uint8 [pieces, span + 1].
        table_of: uint8 [contexts].
        kinds: int64 [tables, 2], R and V.
        escapes: X.
        latch: symbols that share a table.
        symbols: output uint16, large enough (see `symbol_bound`).
        symbol_start: output int64 [streams + 1].
        counts: int64 [tables, 4096], symbol counts are added; a stream's last symbol counts as R zeros.

    Returns:
        Number of symbols.
    """
    pieces, span = slot_class.shape[0], slot_class.shape[1] - 1
    n = 0
    for stream in range(start.size - 1):
        symbol_start[stream] = n
        a = int(row_class[stream // pieces])
        classes = slot_class[stream % pieces]
        at, left, rest, sign = 0, 0, 0, 0
        table, run, top = 0, 0, 0
        k, stop = start[stream], start[stream + 1]
        while True:
            if left == 0:
                table = int(table_of[a + classes[at]])
                run, top = kinds[table, 0], kinds[table, 1]
                left = latch
            left -= 1
            if rest > 0:
                e = 0
                while e + 1 < escapes and (2 << e) <= rest:
                    e += 1
                rest -= 1 << e
                symbol = 1 + 2 * (run * top + e) + sign
            elif k < stop:
                zeros = int(position[k]) - at
                if zeros >= run:
                    symbol = 0
                    at += run
                else:
                    q = int(value[k])
                    sign = 1 if q < 0 else 0
                    size = abs(q)
                    rest = max(size - top, 0)
                    symbol = 1 + 2 * (zeros * top + size - rest - 1) + sign
                    at += zeros + 1
                    k += 1
            elif span - at > run:
                symbol = 0
                at += run
            else:
                symbols[n] = table << 12 | (span - at)
                counts[table, 0] += 1
                n += 1
                break
            symbols[n] = table << 12 | symbol
            counts[table, symbol] += 1
            n += 1
    symbol_start[start.size - 1] = n
    return n


@nb.njit(cache=True, nogil=True)
def emit(
    symbols: U16, symbol_start: I64, codes: U32, lengths: U8, last_symbol: U16, words: U32, bits: I64
) -> int:
    """Writes symbols as code words.

    Args:
        symbols, symbol_start: of `parse`.
        codes, lengths: uint32 and uint8 [tables, 4096].
        last_symbol: uint16 [tables, 64], the symbol written for a number of columns left.
        words: output, long enough for 12 bits a symbol; every word before the returned bit is set.
        bits: output int64 [streams + 1], bit at which each stream starts.

    Returns:
        Number of bits.
    """
    word, held, buffer = 0, 0, np.uint64(0)
    for stream in range(symbol_start.size - 1):
        bits[stream] = 32 * word + held
        stop = symbol_start[stream + 1] - 1
        for k in range(symbol_start[stream], stop + 1):
            table, symbol = symbols[k] >> 12, symbols[k] & 4095
            if k == stop:
                symbol = int(last_symbol[table, symbol])
            buffer |= np.uint64(codes[table, symbol]) << np.uint64(held)
            held += int(lengths[table, symbol])
            if held >= 32:
                words[word] = np.uint32(buffer & np.uint64(0xFFFFFFFF))
                buffer >>= np.uint64(32)
                held -= 32
                word += 1
    words[word] = np.uint32(buffer)
    bits[symbol_start.size - 1] = 32 * word + held
    return 32 * word + held


def symbol_bound(nonzero: int, extra: int, streams: int, span: int, shortest_run: int) -> int:
    """Upper bound of symbols: each non-zero, its escapes, zero runs between them, one end per stream."""
    return nonzero + extra + streams * (span // shortest_run + 2) + nonzero
