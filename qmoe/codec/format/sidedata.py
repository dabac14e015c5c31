"""Side data of a matrix (classes, scales, run lengths): Huffman codes plus raw low bits.

A `Field` is the model of one such sequence, shared by a group and stored in its header:
``value = base + slope * predictor + step * (digit << raw_bits | raw)``. Digits are coded in tuples,
so that a nearly constant sequence costs less than a bit a value; a constant one costs nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numba as nb
import numpy as np

from qmoe.codec.format.arrays import I64, U8, U32, U64
from qmoe.codec.format.bits import BitReader, BitWriter
from qmoe.codec.format.huffman import (
    MAX_LENGTH,
    canonical_codes,
    code_lengths,
    fill_lookup,
    is_complete,
)
from qmoe.errors import CorruptError

_BASE, _STEP, _SLOPE, _RAW, _DIGITS, _TUPLE = 32, 12, 8, 5, 8, 3  # widths in the header, bits
_MAX_RAW = 18
_MAX_SYMBOLS = 256


@dataclass(frozen=True)
class Field:
    """Model of one sequence.

    Attributes:
        base: smallest value after prediction, signed 32 bits.
        slope: multiplies the predictor, signed 8 bits.
        step: granularity, 1..4095.
        raw_bits: low bits stored verbatim, 0..18; 0 if digits are coded in tuples.
        digits: number of digits D, 1..256; 1: no code.
        size: digits per tuple, 1..8; D^size <= 256. The first digit of a tuple is its lowest.
        lengths: uint8 [D^size], code lengths of tuples.
    """

    base: int
    slope: int
    step: int
    raw_bits: int
    digits: int
    size: int
    lengths: U8

    def write(self, out: BitWriter) -> None:
        """Appends the model to a header."""
        out.put(self.base & 0xFFFFFFFF, _BASE)
        out.put(self.slope & 0xFF, _SLOPE)
        out.put(self.step, _STEP)
        out.put(self.raw_bits, _RAW)
        out.put(self.digits - 1, _DIGITS)
        out.put(self.size - 1, _TUPLE)
        if self.digits > 1:
            for length in self.lengths:
                out.put(int(length), 4)

    @staticmethod
    def read(source: BitReader) -> "Field":
        """Reads and validates what `write` wrote; raises CorruptError."""
        base, slope, step = source.get(_BASE), source.get(_SLOPE), source.get(_STEP)
        raw_bits, digits, size = source.get(_RAW), source.get(_DIGITS) + 1, source.get(_TUPLE) + 1
        count = digits**size
        if not step or raw_bits > _MAX_RAW or count > _MAX_SYMBOLS or (size > 1 and raw_bits):
            raise CorruptError(
                f"side data with step {step}, {raw_bits} raw bits, {size} of {digits} digits"
            )
        lengths = np.zeros(count, np.uint8)
        if digits > 1:
            lengths[:] = [source.get(4) for _ in range(count)]
            if not is_complete(lengths, MAX_LENGTH):
                raise CorruptError(
                    f"side data field with an incomplete code of lengths {lengths.tolist()}"
                )
        base -= (base >> 31) << 32
        slope -= (slope >> 7) << 8
        return Field(base, slope, step, raw_bits, digits, size, lengths)

    def encode(self, values: I64, predictor: I64 | int = 0) -> tuple[U64, U8]:
        """Bit strings of a sequence: uint64 values and uint8 widths, one per tuple, for `pack`."""
        units = (values - self.slope * predictor - self.base) // self.step
        symbols = _tuples(units >> self.raw_bits, self.digits, self.size)
        if self.digits == 1:
            code, widths = np.zeros(symbols.size, np.uint64), np.zeros(symbols.size, np.uint8)
        else:
            code, widths = canonical_codes(self.lengths)[symbols], self.lengths[symbols]
        if self.raw_bits:
            raw = (units & ((1 << self.raw_bits) - 1)).astype(np.uint64)
            return code | raw << widths.astype(np.uint64), widths + np.uint8(self.raw_bits)
        return code.astype(np.uint64), widths

    def decode(
        self, words: U32, position: int, count: int, predictor: I64 | int = 0
    ) -> tuple[I64, int]:
        """Reads `count` values at bit `position` of `words`, which must end with two padding words.

        Returns:
            int64 [count] and the position behind them.

        Raises:
            CorruptError: the words end too early, or digits beyond the last value are not zero.
        """
        units = np.empty(-(-count // self.size), np.int64)
        coded = self.digits > 1
        lookup = fill_lookup(self.lengths, MAX_LENGTH) if coded else np.zeros(1, np.uint32)
        end = 32 * (words.size - 2)
        after = int(_read_units(words, np.int64(position), end, lookup, self.raw_bits, units))
        if after < 0:
            raise CorruptError(f"side data runs over its {end} bits")
        if self.size > 1:
            powers = self.digits ** np.arange(self.size)
            units = (units[:, None] // powers % self.digits).ravel()
            if units[count:].any():
                raise CorruptError(f"digits behind the last of {count} values of side data")
        return self.base + self.slope * predictor + self.step * units[:count], after


def _tuples(digits: I64, base: int, size: int) -> I64:
    """Numbers of consecutive tuples of digits, zeros appended: int64 [ceil(n / size)]."""
    if size == 1:
        return digits
    padded = np.concatenate([digits, np.zeros(-digits.size % size, np.int64)])
    return padded.reshape(-1, size) @ base ** np.arange(size)


def fit_field(
    values: Sequence[I64], predictors: Sequence[I64] | None = None, slopes: Sequence[int] = (0,)
) -> Field:
    """The cheapest field for the sequences of a group, its own bits in the header included.

    Args:
        values, predictors: one sequence per matrix.
        slopes: to be tried.
    """
    best: tuple[float, Field] | None = None
    for slope in slopes:
        rest = list(values)
        if slope and predictors is not None:
            rest = [v - slope * p for v, p in zip(values, predictors, strict=True)]
        base = min(int(r.min()) for r in rest)
        step = int(np.gcd.reduce(np.concatenate(rest) - base)) or 1
        step = step if step < 1 << _STEP else 1
        units = [(r - base) // step for r in rest]
        for field, bits in _fields(units, base, slope, step):
            if best is None or bits < best[0]:
                best = bits, field
    if best is None:
        low, high = min(int(v.min()) for v in values), max(int(v.max()) for v in values)
        raise ValueError(f"side data values from {low} to {high} do not fit the format")
    return best[1]


def _fields(units: list[I64], base: int, slope: int, step: int) -> Iterator[tuple[Field, float]]:
    """Fields for non-negative sequences, with their cost in bits."""
    flat = np.concatenate(units)
    top = int(flat.max())
    if top == 0:
        yield Field(base, slope, step, 0, 1, 1, np.zeros(1, np.uint8)), 0.0
        return
    for raw_bits in range(_MAX_RAW + 1):
        digits = (top >> raw_bits) + 1
        if digits == 1 or digits > _MAX_SYMBOLS:
            continue
        counts = np.bincount(flat >> raw_bits)
        lengths = code_lengths(counts, MAX_LENGTH)
        bits = float((counts * lengths).sum() + 4 * digits + raw_bits * flat.size)
        yield Field(base, slope, step, raw_bits, digits, 1, lengths), bits
    for size in range(2, 9):
        digits = top + 1
        if digits**size > _MAX_SYMBOLS:
            break
        symbols = np.concatenate([_tuples(u, digits, size) for u in units])
        counts = np.bincount(symbols, minlength=digits**size)
        lengths = code_lengths(counts, MAX_LENGTH)
        bits = float((counts * lengths).sum() + 4 * counts.size)
        yield Field(base, slope, step, 0, digits, size, lengths), bits


@nb.njit(cache=True, nogil=True)
def pack(values: U64, widths: U8, words: U32) -> int:
    """Writes bit strings one after another into zeroed `words`, least significant bit first;
    returns the number of bits."""
    position = 0
    for i in range(values.size):
        word, shift = position >> 5, np.uint64(position & 31)
        value = values[i] << shift
        words[word] |= np.uint32(value & np.uint64(0xFFFFFFFF))
        if int(shift) + widths[i] > 32:
            words[word + 1] |= np.uint32(value >> np.uint64(32))
        position += widths[i]
    return position


@nb.njit(cache=True, nogil=True)
def _read_units(
    words: U32, position: np.int64, end: int, lookup: U32, raw_bits: int, out: I64
) -> np.int64:
    mask = np.uint64(lookup.size - 1)
    raw_mask = np.uint64((1 << raw_bits) - 1)
    for i in range(out.size):
        if position > end:
            return np.int64(-1)
        word = position >> 5
        window = np.uint64(words[word]) | np.uint64(words[word + 1]) << np.uint64(32)
        window >>= np.uint64(position & 31)
        entry = np.int64(lookup[window & mask])
        raw = np.int64(window >> np.uint64(entry & 15) & raw_mask)
        out[i] = entry >> 4 << raw_bits | raw
        position += (entry & 15) + raw_bits
    return position if position <= end else np.int64(-1)
