"""Side data of a matrix (classes, scales, segment lengths): Huffman codes plus raw low bits.

A `Field` is the model of one such sequence, shared by a group and stored in its header: ``value =
base + slope * predictor + step * (symbol << raw_bits | raw)``. A field whose only symbol is 0
writes no code at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numba as nb
import numpy as np

from qmoe.codec.arrays import I64, U8, U32, U64
from qmoe.codec.bits import BitReader, BitWriter
from qmoe.codec.huffman import MAX_LENGTH, canonical_codes, code_lengths, fill_lookup, is_complete
from qmoe.errors import CorruptError

_BASE, _STEP, _SLOPE, _RAW, _COUNT = 32, 12, 8, 5, 8  # widths of a field's header entries, bits
_MAX_RAW = 18


@dataclass(frozen=True)
class Field:
    """Model of one sequence.

    Attributes:
        base: smallest value after prediction, signed 32 bits.
        slope: multiplies the predictor, signed 8 bits.
        step: granularity, 1..4095.
        raw_bits: low bits stored verbatim, 0..18.
        lengths: uint8 [n], code lengths of the high part, 1 <= n <= 256; n = 1: no code.
    """

    base: int
    slope: int
    step: int
    raw_bits: int
    lengths: U8

    def write(self, out: BitWriter) -> None:
        """Appends the model to a header."""
        out.put(self.base & 0xFFFFFFFF, _BASE)
        out.put(self.slope & 0xFF, _SLOPE)
        out.put(self.step, _STEP)
        out.put(self.raw_bits, _RAW)
        out.put(self.lengths.size - 1, _COUNT)
        if self.lengths.size > 1:
            for length in self.lengths:
                out.put(int(length), 4)

    @staticmethod
    def read(source: BitReader) -> "Field":
        """Reads and validates what `write` wrote; raises CorruptError."""
        base, slope = source.get(_BASE), source.get(_SLOPE)
        step, raw_bits, count = source.get(_STEP), source.get(_RAW), source.get(_COUNT) + 1
        if not step or raw_bits > _MAX_RAW:
            raise CorruptError(f"side data field with step {step} and {raw_bits} raw bits")
        lengths = np.zeros(count, np.uint8)
        if count > 1:
            lengths[:] = [source.get(4) for _ in range(count)]
            if not is_complete(lengths, MAX_LENGTH):
                raise CorruptError(
                    f"side data field with an incomplete code of lengths {lengths.tolist()}"
                )
        base -= (base >> 31) << 32
        return Field(base, slope - ((slope >> 7) << 8), step, raw_bits, lengths)

    def encode(self, values: I64, predictor: I64 | int = 0) -> tuple[U64, U8]:
        """Bit strings of a sequence: value uint64 [n] and width uint8 [n] of each element, for
        `pack`."""
        units = (values - self.slope * predictor - self.base) // self.step
        high = units >> self.raw_bits
        raw = (units & ((1 << self.raw_bits) - 1)).astype(np.uint64)
        if self.lengths.size == 1:
            return raw, np.full(values.size, self.raw_bits, np.uint8)
        widths = self.lengths[high]
        return canonical_codes(self.lengths)[high] | raw << widths.astype(
            np.uint64
        ), widths + np.uint8(self.raw_bits)

    def decode(
        self, words: U32, position: int, count: int, predictor: I64 | int = 0
    ) -> tuple[I64, int]:
        """Reads `count` values at bit `position` of `words`, which must end with two padding words.

        Returns:
            int64 [count] and the position behind them. Raises CorruptError when the words end too
            early.
        """
        units = np.empty(count, np.int64)
        coded = self.lengths.size > 1
        lookup = fill_lookup(self.lengths, MAX_LENGTH) if coded else np.zeros(1, np.uint32)
        end = 32 * (words.size - 2)
        after = int(_read_units(words, np.int64(position), end, lookup, self.raw_bits, units))
        if after < 0:
            raise CorruptError(f"side data runs over its {end} bits")
        return self.base + self.slope * predictor + self.step * units, after


def fit_field(
    values: Sequence[I64], predictors: Sequence[I64] | None = None, slopes: Sequence[int] = (0,)
) -> Field:
    """The cheapest field for the sequences of a group (header included), by trying slopes and
    numbers of raw bits."""
    best: tuple[float, Field] | None = None
    flat = np.concatenate(values)
    prediction = np.concatenate(predictors) if predictors is not None else np.zeros_like(flat)
    for slope in slopes:
        rest = flat - slope * prediction
        base = int(rest.min())
        step = int(np.gcd.reduce(rest - base)) or 1
        step = step if step < 1 << _STEP else 1
        units = (rest - base) // step
        top = int(units.max())
        for raw_bits in range(_MAX_RAW + 1):
            if top >> raw_bits > 255:
                continue
            counts = np.bincount(units >> raw_bits).astype(np.int64)
            if counts.size == 1:
                lengths, bits = np.zeros(1, np.uint8), float(raw_bits * units.size)
            else:
                lengths = code_lengths(counts, MAX_LENGTH)
                bits = float((counts * lengths).sum() + 4 * counts.size + raw_bits * units.size)
            if best is None or bits < best[0]:
                best = bits, Field(base, slope, step, raw_bits, lengths)
            if counts.size == 1:
                break
    if best is None:
        raise ValueError(
            f"side data values from {flat.min()} to {flat.max()} do not fit the format"
        )
    return best[1]


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
