"""How a matrix is cut into streams: derived from its shape and its column classes.

A row is cut into P = ceil(cols / 1024) pieces; the coded columns, sorted by falling class, are
dealt to the pieces in turn, so pieces are alike. Every piece has n = ceil(coded / P) columns
(missing ones are virtual zeros) and one more virtual zero column behind them: a stream covers
C = n + 1 columns and ends with the symbol that reaches position C.
"""

from dataclasses import dataclass

import numpy as np

from qmoe.codec.format.arrays import I32, U8
from qmoe.codec.format.classes import column_order

MAX_PIECE = 1024
MAX_COLS = 65535
MAX_ROWS = (1 << 24) - 1


def piece_count(cols: int) -> int:
    """Pieces per row."""
    return -(-cols // MAX_PIECE)


@dataclass(frozen=True)
class Geometry:
    """Pieces of a matrix.

    Attributes:
        pieces: P.
        span: C, positions of a stream; `position` counts columns consumed, 0..C.
        slots: int32 [P, C + 1], column of the weight that ends at a position: slots[p, 0] and
            virtual columns hold `cols`.
        slot_class: uint8 [P, C + 1], class of the column that is next at a position; the last one
            is repeated at the end.
    """

    pieces: int
    span: int
    slots: I32
    slot_class: U8


def geometry(col_class: U8) -> Geometry:
    """Geometry of a matrix with these column classes (0 = not coded), of which one is coded."""
    cols = col_class.size
    order = column_order(col_class)
    pieces = piece_count(cols)
    n = -(-order.size // pieces)
    dealt = np.full(n * pieces, cols, np.int32)
    dealt[: order.size] = order
    slots = np.full((pieces, n + 2), cols, np.int32)
    slots[:, 1:-1] = dealt.reshape(n, pieces).T
    classes = np.full(n * pieces, col_class[order[-1]] - 1, np.uint8)
    classes[: order.size] = col_class[order] - 1
    slot_class = np.empty((pieces, n + 2), np.uint8)
    slot_class[:, :n] = classes.reshape(n, pieces).T
    slot_class[:, n:] = slot_class[:, n - 1 : n]
    return Geometry(pieces, n + 1, slots, slot_class)
