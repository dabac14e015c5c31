"""The symbols of one table: what a code word does to the position and to the weight there.

Table kinds are (R, V) with an escape depth X common to a group:

====================================  ==================  ==================================
symbol                                (advance, value)    meaning
====================================  ==================  ==================================
0                                     (R, 0)              R zeros
1 + 2 * (r * V + v - 1) + s           (r + 1, v or -v)    r zeros, then v (s = 0) or -v (s = 1)
1 + 2 * R * V + 2 * k + s             (0, 2^k or -2^k)    adds to the weight just written
====================================  ==================  ==================================

with 0 <= r < R, 1 <= v <= V, 0 <= k < X. R = 1 codes weights singly. A weight beyond V is +-V plus
escapes of its own sign.
"""

import numpy as np

from qmoe.codec.format.arrays import I32, I64

MAX_RUN, MAX_VALUE, MAX_ESCAPES = 62, 127, 5
SHORT_LIMIT, SHORT_VALUE = (
    8,
    31,
)  # with codes of 8 bits values fit in 6 bits, so that lookup entries fit in 16


def value_bound(limit: int) -> int:
    """Largest V with codes of at most `limit` bits."""
    return SHORT_VALUE if limit <= SHORT_LIMIT else MAX_VALUE


def symbol_count(run: int, value: int, escapes: int) -> int:
    """Number of symbols of a table (R, V) with X escapes."""
    return 1 + 2 * run * value + 2 * escapes


def symbol_effects(run: int, value: int, escapes: int) -> tuple[I32, I32]:
    """Advance and value of every symbol, int32 [symbol_count] each."""
    signs = np.array([1, -1], np.int32)
    steps = np.repeat(np.arange(1, run + 1, dtype=np.int32), 2 * value)
    values = np.tile((np.arange(1, value + 1, dtype=np.int32)[:, None] * signs).ravel(), run)
    powers = ((1 << np.arange(escapes, dtype=np.int32))[:, None] * signs).ravel()
    advance = np.concatenate([np.array([run], np.int32), steps, np.zeros(2 * escapes, np.int32)])
    return advance, np.concatenate([np.zeros(1, np.int32), values, powers.astype(np.int32)])


def length_predictor(run: int, value: int, escapes: int) -> I64:
    """For each symbol the earlier one whose code length predicts its own: the other sign, one run
    or one value less; -1 = none."""
    n = symbol_count(run, value, escapes)
    source = np.arange(n, dtype=np.int64) - 2
    plain = np.arange(n) <= 2 * run * value
    source[plain] -= 2 * value - 2  # one zero less before the same value
    first = np.arange(n) <= 2 * value
    source[first] += 2 * value - 2  # no zero before it: one value less
    source[2::2] = np.arange(2, n, 2) - 1  # negative: same as positive
    source[:2] = -1, 0
    return source
