"""Bit strings of group headers in 32-bit words, least significant bit first."""

import numpy as np

from qmoe.codec.format.arrays import U32
from qmoe.errors import CorruptError


class BitWriter:
    """Collects fixed-width fields; `words` pads the last word with zero bits."""

    def __init__(self) -> None:
        self._value = 0
        self.bits = 0

    def put(self, value: int, width: int) -> None:
        """Appends `value` as `width` bits; raises ValueError if it does not fit."""
        if not 0 <= value < 1 << width:
            raise ValueError(f"{value} does not fit in {width} bits")
        self._value |= value << self.bits
        self.bits += width

    def words(self) -> U32:
        """All bits so far as uint32 [ceil(bits / 32)]."""
        return np.frombuffer(self._value.to_bytes(-(-self.bits // 32) * 4, "little"), "<u4").copy()


class BitReader:
    """Reads what `BitWriter` wrote; CorruptError when the words end too early."""

    def __init__(self, words: U32) -> None:
        self._value = int.from_bytes(words.astype("<u4").tobytes(), "little")
        self.position, self.bits = 0, 32 * words.size

    def get(self, width: int) -> int:
        """The next `width` bits."""
        if self.position + width > self.bits:
            raise CorruptError(f"header ends at bit {self.bits}, needed {self.position + width}")
        value = (self._value >> self.position) & ((1 << width) - 1)
        self.position += width
        return value

    def peek(self, width: int) -> int:
        """The next `width` bits without moving on; zeros behind the end."""
        return (self._value >> self.position) & ((1 << width) - 1)

    def finish(self) -> None:
        """Checks that only the zero bits that pad the last word are left."""
        if self.bits - self.position >= 32 or self._value >> self.position:
            raise CorruptError(
                f"header has {self.bits - self.position} unexplained bits at its end"
            )
