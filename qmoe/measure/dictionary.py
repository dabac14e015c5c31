"""QMoE's 16-bit dictionary code as a yardstick: what ternary rows would cost in that format.

Frantar and Alistarh, "QMoE: Practical Sub-1-Bit Compression of Trillion-Parameter Models" (2023):
2^16 code words, each a string of up to 14 pairs of ternary weights, built by extending the most
probable string first for p(0) = 0.885; rows are parsed greedily, code words never span rows, and a
row needs 64 bits beside them. Only the size is computed here.
"""

import heapq
from collections.abc import Sequence
from functools import cache

import numba as nb
import numpy as np

from qmoe.codec.format.arrays import I8, I32
from qmoe.types import QuantizedMatrix

WORD_BITS, ROW_BITS, MAX_PAIRS, P_ZERO = 16, 64, 14, 0.885


@cache
def build_trie(words: int = 1 << WORD_BITS) -> I32:
    """The dictionary as a trie.

    Args:
        words: number of strings; the nine of one pair are among them.

    Returns:
        int32 [words + 1, 9]: the node that follows a node (root 0) on the pair (a, b), digits
        3 * a + b with 0, 1, 2 for weights 0, 1, -1; -1 = none.
    """
    child = np.full((words + 1, 9), -1, np.int32)
    single = [P_ZERO, (1 - P_ZERO) / 2, (1 - P_ZERO) / 2]
    pair = [a * b for a in single for b in single]
    heap = [(-p, 1, 0, d) for d, p in enumerate(pair)]
    heapq.heapify(heap)
    for node in range(1, words + 1):
        weight, length, parent, digit = heapq.heappop(heap)
        child[parent, digit] = node
        if length < MAX_PAIRS:
            for d, p in enumerate(pair):
                heapq.heappush(heap, (weight * p, length + 1, node, d))
    return child


@nb.njit(cache=True, nogil=True)
def _count_words(codes: I8, child: I32) -> np.int64:
    total = np.int64(0)
    cols = codes.shape[1]
    for i in range(codes.shape[0]):
        node = np.int32(0)
        for j in range(0, cols, 2):
            digit = 0
            for k in range(2):
                q = codes[i, j + k] if j + k < cols else 0
                digit = 3 * digit + (0 if q == 0 else (1 if q > 0 else 2))
            following = child[node, digit]
            if following < 0:
                total += 1
                following = child[0, digit]
            node = following
        total += 1
    return total


def dictionary_bits(matrices: Sequence[QuantizedMatrix]) -> int:
    """Bits of the signs of all codes (larger values count as +-1), 64 bits a row included."""
    codes = [np.ascontiguousarray(m.codes.numpy()) for m in matrices]
    words = sum(int(_count_words(c, build_trie())) for c in codes)
    rows = sum(int(c.shape[0]) for c in codes)
    return words * WORD_BITS + ROW_BITS * rows
