"""How a budget of bits is divided: one slope for all matrices, from their sizes alone.

Noise in a matrix's output, relative to that output, is taken to hurt alike wherever it arises: a
key projection as much as an embedding table of a hundred times its weights. The noise of b bits is
in proportion to 4^-b, so the smallest sum at a given number of bits gives every part

    b = t - log2(weights of the part) / 2,

one t for all, clamped to what the coder is made for. No gradient is needed, so that a model of any
size is divided in the same way; docs/log-quant.md compares it with equal bits and with gradients.

Knows nothing about models or files.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LOW, HIGH = 2.0, 8.0  # bits per weight that a dense matrix may be given
_DIGITS = 3  # of a rate; further ones mean nothing


@dataclass(frozen=True)
class Part:
    """Weights that are coded at one rate, `copies` times.

    Attributes:
        weights: of one copy.
        copies: how many there are.
        low, high: bits per weight that it may be given.
    """

    weights: int
    copies: int = 1
    low: float = LOW
    high: float = HIGH

    def at(self, t: float) -> float:
        """Bits per weight at a slope."""
        return min(self.high, max(self.low, t - math.log2(self.weights) / 2))


def total(parts: Sequence[Part], t: float) -> float:
    """Bits of all parts at a slope."""
    return sum(p.weights * p.copies * p.at(t) for p in parts)


def slope(parts: Sequence[Part], budget: float) -> float:
    """The slope t at which all parts together take `budget` bits; the nearest where none does."""
    low, high = -100.0, 200.0
    for _ in range(80):
        middle = (low + high) / 2
        if total(parts, middle) > budget:
            high = middle
        else:
            low = middle
    return low


def dense_rates(weights: Mapping[str, int], bits: float) -> dict[str, float]:
    """Bits per weight of every dense matrix, so that all together take `bits` per weight.

    Args:
        weights: of the matrices, by name.
        bits: their mean, LOW to HIGH.
    """
    parts = [Part(n) for n in weights.values()]
    t = slope(parts, bits * sum(weights.values()))
    return {name: round(Part(n).at(t), _DIGITS) for name, n in weights.items()}
