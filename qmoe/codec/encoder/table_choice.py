"""Choice of a group's tables: which contexts share one and of which kind (R, V) it is.

Both are decided from histograms of the weights by context, as if weights were independent within a
context, without parsing the streams. Contexts are ordered by expected magnitude, so tables are runs
of neighbouring contexts and dynamic programming finds the best cut.
"""

from dataclasses import dataclass

import numba as nb
import numpy as np

from qmoe.codec.format.arrays import F64, I64, U8
from qmoe.codec.format.huffman import code_lengths
from qmoe.codec.format.symbols import MAX_ESCAPES, symbol_count, value_bound

MAX_TABLES = 16
RUNS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 62)
VALUES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 31, 48, 64, 96, 127)
_TABLE_BITS = 16 + 90  # typical header cost of a table


@dataclass(frozen=True)
class Model:
    """Tables of a group before their code lengths are known.

    Attributes:
        first: context at which each table starts, rising, first[0] = 0.
        kinds: (R, V) per table.
        escapes: X, common to all.
        bits: expected size of the streams.
        entropy: of the weights given their tables, bits.
    """

    first: list[int]
    kinds: list[tuple[int, int]]
    escapes: int
    bits: float
    entropy: float

    def table_of(self, contexts: int) -> U8:
        """Table of each context, uint8 [contexts]."""
        starts = np.zeros(contexts, np.int64)
        starts[self.first] = 1
        return (np.cumsum(starts) - 1).astype(np.uint8)


@nb.njit(cache=True, nogil=True)
def _cut(prefix: F64, tables: int, table_bits: float) -> I64:
    """Best cut of contexts into at most `tables` runs; prefix float64 [contexts + 1, alphabet] of
    counts. Returns the starts."""
    contexts, alphabet = prefix.shape[0] - 1, prefix.shape[1]
    cost = np.zeros((contexts, contexts + 1))
    for s in range(contexts):
        for e in range(s + 1, contexts + 1):
            total, bits = 0.0, 0.0
            for v in range(alphabet):
                n = prefix[e, v] - prefix[s, v]
                if n > 0.5:
                    total += n
                    bits -= n * np.log2(n)
            if total > 0.5:
                bits += total * np.log2(total)
            cost[s, e] = bits + table_bits
    best = np.full((tables + 1, contexts + 1), np.inf)
    back = np.zeros((tables + 1, contexts + 1), np.int64)
    best[0, 0] = 0.0
    for t in range(1, tables + 1):
        for e in range(1, contexts + 1):
            for s in range(e):
                c = best[t - 1, s] + cost[s, e]
                if c < best[t, e]:
                    best[t, e] = c
                    back[t, e] = s
    t = int(np.argmin(best[:, contexts]))
    starts = np.zeros(t, np.int64)
    e = contexts
    for k in range(t - 1, -1, -1):
        e = back[k + 1, e]
        starts[k] = e
    return starts


@nb.njit(cache=True, nogil=True)
def _expected_counts(histogram: F64, run: int, value: int, escapes: int, out: I64) -> float:
    """Expected symbol counts per 2^20 starting symbols of a table; returns the weights that they
    advance.

    histogram: float64 [256], count of q at index q + 128.
    """
    total = 0.0
    for count in histogram:
        total += count
    p0 = histogram[128] / total
    scale = float(1 << 20)
    at = np.zeros(2 * value)  # probability of each (v, s), V holding all beyond
    extra = np.zeros(2 * escapes) if escapes else np.zeros(1)
    for q in range(-128, 128):
        p = histogram[q + 128] / total
        if q == 0 or p == 0:
            continue
        size, sign = abs(q), 1 if q < 0 else 0
        at[2 * (min(size, value) - 1) + sign] += p
        rest = size - value
        if escapes:
            while rest > 0:
                k = 0
                while k + 1 < escapes and (2 << k) <= rest:
                    k += 1
                extra[2 * k + sign] += p
                rest -= 1 << k
    reach, starts, advance = 1.0, 0.0, 0.0
    for r in range(run):
        for k in range(2 * value):
            out[1 + 2 * r * value + k] = int(scale * reach * at[k])
        starts += reach
        advance += reach * (1 - p0) * (r + 1)
        reach *= p0
    advance += reach * run
    out[0] = max(int(scale * reach), 1)
    for k in range(2 * escapes):
        out[1 + 2 * run * value + k] = int(scale * starts * extra[k])
    return advance * scale


@nb.njit(cache=True, nogil=True)
def _kind_cost(histogram: F64, run: int, value: int, escapes: int, limit: int) -> float:
    """Bits per weight of a table kind on independent weights with this histogram."""
    n = 1 + 2 * run * value + 2 * escapes
    counts = np.zeros(n, np.int64)
    advance = _expected_counts(histogram, run, value, escapes, counts)
    lengths = code_lengths(counts, limit)
    bits = 0
    for k in range(n):
        bits += counts[k] * lengths[k]
    return float(bits / advance)


def cut(histogram: I64) -> list[int]:
    """Contexts at which the tables of a group start, first 0.

    Args:
        histogram: int64 [contexts, 256], count of q at index q + 128 in each context.
    """
    used = np.flatnonzero(histogram.sum(0))
    contexts = np.flatnonzero(histogram.sum(1))
    prefix = np.zeros((contexts.size + 1, used.size))
    np.cumsum(histogram[contexts][:, used], axis=0, out=prefix[1:])
    return [0, *(int(contexts[c]) for c in _cut(prefix, MAX_TABLES, float(_TABLE_BITS))[1:])]


def choose(histogram: I64, first: list[int], limit: int, max_size: int) -> Model:
    """Kinds of the tables of a group.

    Args:
        histogram: int64 [contexts, 256], count of q at index q + 128 in each context.
        first: of `cut`.
        limit: longest code, bits.
        max_size: largest |q| of the group.
    """
    escapes = min(MAX_ESCAPES, max(max_size - 1, 0).bit_length())
    kinds, bits, entropy = [], 0.0, 0.0
    for start, stop in zip(first, [*first[1:], histogram.shape[0]], strict=True):
        counts = histogram[start:stop].sum(0).astype(np.float64)
        cost, kind = _best_kind(counts, limit, escapes)
        kinds.append(kind)
        bits += cost
        some = counts[counts > 0]
        entropy += float((some * np.log2(some.sum() / some)).sum())
    return Model(first, kinds, escapes, bits, entropy)


def _best_kind(histogram: F64, limit: int, escapes: int) -> tuple[float, tuple[int, int]]:
    """Cheapest (R, V) and its bits, by descent from a first guess over neighbouring runs and
    values."""
    weights = histogram.sum()
    zeros = min(histogram[128] / weights, 0.999)
    guess = 1.0 if zeros < 0.1 else float(np.log(0.2) / np.log(zeros))
    costs: dict[tuple[int, int], float] = {}

    def cost(i: int, j: int) -> float:
        if not (0 <= i < len(RUNS) and 0 <= j < len(VALUES)):
            return np.inf
        if (i, j) not in costs:
            run, value = RUNS[i], VALUES[j]
            fits = symbol_count(run, value, escapes) <= 1 << limit and value <= value_bound(limit)
            bits = (
                _kind_cost(histogram, run, value, escapes, limit) * weights + 2.0 * run * value
                if fits
                else np.inf
            )
            costs[i, j] = bits
        return costs[i, j]

    at = int(np.searchsorted(RUNS[:-1], guess)), 0
    while True:
        i, j = at
        around = [
            at,
            *((i + x, j + y) for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, -1), (-1, 1))),
        ]
        best = min(around, key=lambda c: cost(*c))
        if best == at:
            return cost(*at), (RUNS[i], VALUES[j])
        at = best
