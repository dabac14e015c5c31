"""Classes of rows and columns: half octaves of mean |q| under the model E|q_ij| = row_i * col_j.

The class sum a_i + b_j is the *context* of a weight; half an octave apart means a factor sqrt(2) in
expected magnitude. All arithmetic before the logarithm is on integers, so the classes do not depend
on the order of summation.
"""

from dataclasses import dataclass

import numba as nb
import numpy as np

from qmoe.codec.format.arrays import F64, I8, I32, I64, U8

CONTEXTS = 63  # context numbers 0..62
MAX_CLASS = 62
_STEPS = 2  # classes per octave
_FLOOR = -18  # nothing is expected below 2^-9 per weight: 62 zeros cost one bit anyway


@dataclass(frozen=True)
class Classes:
    """Classes of one matrix.

    Attributes:
        row: uint8 [rows], 0..62.
        col: uint8 [cols]: 0 = all zero, not coded; c >= 1 means column class c - 1.
    """

    row: U8
    col: U8

    def col_counts(self) -> I64:
        """How many coded columns have each class 0, 1, ...: int64 [largest class + 1]."""
        return np.bincount(self.col[self.col > 0] - 1)


def column_order(col: U8) -> I32:
    """Columns with a class above 0, by falling class and then by index: int32 [coded columns]."""
    order = np.argsort(-col.astype(np.int16), kind="stable")
    return order[: np.count_nonzero(col)].astype(np.int32)


@nb.njit(cache=True, nogil=True)
def _sums(codes: I8, row_weight: I32, col_weight: I32, row: I64, col: I64) -> None:
    """row_i = sum_j |q_ij| col_weight_j and col_j = sum_i |q_ij| row_weight_i."""
    rows, cols = codes.shape
    part = np.zeros(cols, np.int32)
    for i in range(rows):
        line = codes[i]
        total = np.int32(0)
        weight = row_weight[i]
        for j in range(cols):
            size = np.int32(abs(np.int32(line[j])))
            total += size * col_weight[j]
            part[j] += size * weight
        row[i] = total
        if i & 127 == 127 or i == rows - 1:
            for j in range(cols):
                col[j] += part[j]
                part[j] = 0


_UNIT = 256  # weights are integers in 1..256: 128 * 256 * 65535 columns fit in 31 bits


def energies(codes: I8) -> tuple[F64, F64]:
    """Row and column factors with E|q_ij| ~ row_i * col_j.

    The second round weighs each |q| by 1 / (1 + expected |q|), the quasi-likelihood weight for a
    variance m + m^2, so that a few heavy columns do not decide the class of a row.

    Args:
        codes: int8 [rows, cols], C-contiguous.

    Returns:
        float64 [rows] with mean about 1, float64 [cols] = mean |q| of the column; zeros where all
        codes are zero.
    """
    rows, cols = codes.shape
    one_r, one_c = np.ones(rows, np.int32), np.ones(cols, np.int32)
    row, col = np.zeros(rows, np.int64), np.zeros(cols, np.int64)
    _sums(codes, one_r, one_c, row, col)
    mean_col = col / rows
    mean_row = row * (rows / max(int(row.sum()), 1))
    weight_c = np.maximum(np.rint(_UNIT / (1 + mean_col)), 1).astype(np.int32)
    weight_r = np.maximum(np.rint(_UNIT / (1 + mean_row * mean_col.mean())), 1).astype(np.int32)
    row[:], col[:] = 0, 0
    _sums(codes, weight_r, weight_c, row, col)
    new_row = row / max(float((mean_col * weight_c).sum()), 1e-9)
    new_col = col / max(float((new_row * weight_r).sum()), 1e-9)
    return new_row, new_col


def classify(row: F64, col: F64, shift: int) -> Classes:
    """Half-octave classes of energies.

    Args:
        row: row factors [rows].
        col: column factors [cols], 0 for a column of zeros.
        shift: row class of a row factor 1; equal for all matrices of a group.
    """
    low_row = row[row > 0].min() if (row > 0).any() else 1.0
    a = np.rint(_STEPS * np.log2(np.maximum(row, low_row))).astype(np.int64) + shift
    octaves = np.log2(np.maximum(col, 2.0 ** (_FLOOR / _STEPS)))
    b = np.rint(_STEPS * octaves).astype(np.int64) - _FLOOR
    a = a.clip(0, 2 * shift)
    b = b.clip(0, MAX_CLASS - 2 * shift) + 1
    b[col <= 0] = 0
    if not b.any():
        b[0] = 1  # at least one column is coded
    return Classes(a.astype(np.uint8), b.astype(np.uint8))
