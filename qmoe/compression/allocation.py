"""How a budget of bits is divided: one slope for all parts.

Noise of b bits is in proportion to 4^-b. Where the loss feels it s-fold per weight, the smallest
loss at a given number of bits gives every part

    b = t + log2(s) / 2,

one t for all, clamped to what the coder is made for. For dense matrices log2(s) / 2 is measured by
gradients where the model fits in memory, else taken to be alike; see `qmoe.calib.sensitivity`.

Knows nothing about models or files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MIN_BITS, MAX_BITS = 2.0, 8.0  # bits per weight that a dense matrix may be given
_DIGITS = 3  # of a rate; further ones mean nothing


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


def dense_rates(
    weights: Mapping[str, int], bits: float, scores: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Bits per weight of every dense matrix, so that all together take `bits` per weight.

    Args:
        weights: of the matrices, by name.
        bits: their mean, MIN_BITS to MAX_BITS.
        scores: see `Part`; None treats all alike.
    """
    parts = {name: Part(n, (scores or {}).get(name, 0.0)) for name, n in weights.items()}
    t = slope([*parts.values()], bits * sum(weights.values()))
    return {name: round(part.at(t), _DIGITS) for name, part in parts.items()}
