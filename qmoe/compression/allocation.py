"""How a budget of bits is divided: one slope for all parts.

Noise of b bits is in proportion to 4^-b. Where the loss feels it s-fold per weight, the smallest
loss at a given number of bits gives every part

    b = t + log2(s) / 2,

one t for all, clamped to what the coder is made for.

Knows nothing about models or files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

MIN_BITS, MAX_BITS = 2.0, 8.0  # bits per weight that a dense matrix may be given


@dataclass(frozen=True)
class Part:
    """Weights that are coded at one rate.

    Attributes:
        weights: how many.
        score: bits that it should have beyond a common number.
        low, high: bits per weight that it may be given.
    """

    weights: int
    score: float = 0.0
    low: float = MIN_BITS
    high: float = MAX_BITS

    def at(self, t: float) -> float:
        """Bits per weight at a slope."""
        return min(self.high, max(self.low, t + self.score))


def total(parts: Sequence[Part], t: float) -> float:
    """Bits of all parts at a slope."""
    return sum(p.weights * p.at(t) for p in parts)


def slope(parts: Sequence[Part], budget: float) -> float:
    """The slope t at which all parts together take `budget` bits; the nearest where none does."""
    low, high = -200.0, 200.0
    for _ in range(80):
        middle = (low + high) / 2
        if total(parts, middle) > budget:
            high = middle
        else:
            low = middle
    return low
