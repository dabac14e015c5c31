"""A matrix as compiled code sees it: a row of sizes and addresses, int64.

Numbers instead of arrays, because a call that takes many matrices of as many arrays each would
spend its time on unpacking them.
"""

from typing import Any

import numba as nb
import numpy as np

from qmoe.codec.decoder.matrix import PADDING_WORDS, ParsedMatrix
from qmoe.codec.format.arrays import I16, I32, I64, U8, U16, U32, U64
from qmoe.codec.format.classes import CONTEXTS
from qmoe.codec.format.tables import Tables

MAX_ADVANCE = 63  # of a symbol: six bits
_LAST, _PIECES, _ENDS, _WORDS, _STARTS, _ROW_CLASS, _SLOT_CLASS, _SLOTS = range(8)
_COL_INDEX, _ROW_INDEX, _ROW_INDEX_NEG, _ORDER = range(8, 12)
_BITS, _TABLES, _TABLE_OF, _ENTRIES, _LANE_ENTRIES = range(12, 17)


def addresses(tables: Tables, matrix: ParsedMatrix) -> tuple[int, ...]:
    """A row of the table; valid for as long as both arguments live."""
    return (*matrix.addresses, *tables.addresses)


def positions(tables: Tables, matrix: ParsedMatrix) -> int:
    """Positions of a piece and what a group of symbols may run over its end."""
    return matrix.span + 1 + MAX_ADVANCE * tables.latch


@nb.extending.intrinsic
def _pointer(context: Any, address: Any) -> Any:
    """The address as a pointer, for `carray`."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], nb.core.cgutils.voidptr_t)

    return nb.types.voidptr(nb.types.int64), code


@nb.njit(inline="always")
def index_bits(m: I64) -> int:
    """L, bits of an index into the tables."""
    return m[_BITS]  # type: ignore[no-any-return]


@nb.njit(inline="always")
def last_word(m: I64) -> int:
    """The last word that a stream may start in."""
    return m[_LAST]  # type: ignore[no-any-return]


@nb.njit(inline="always")
def room(m: I64) -> int:
    """`positions` of the matrix."""
    return m[_ENDS] + MAX_ADVANCE * (32 // m[_BITS])  # type: ignore[no-any-return]


@nb.njit(inline="always")
def pieces(m: I64) -> int:
    """Streams of a row."""
    return m[_PIECES]  # type: ignore[no-any-return]


@nb.njit(inline="always")
def split(m: I64) -> bool:
    """Whether negative weights have row scales of their own."""
    return m[_ROW_INDEX] != m[_ROW_INDEX_NEG]  # type: ignore[no-any-return]


@nb.njit(inline="always")
def words_of(m: I64) -> U32:
    """The payload and the padding behind it."""
    return nb.carray(_pointer(m[_WORDS]), (m[_LAST] + 1 + PADDING_WORDS,), np.uint32)  # type: ignore[no-any-return]


@nb.njit(inline="always")
def starts_of(m: I64, rows: int) -> I32:
    """Bits at which the streams start."""
    return nb.carray(_pointer(m[_STARTS]), (rows * m[_PIECES] + 1,), np.int32)  # type: ignore[no-any-return]


@nb.njit(inline="always")
def row_class_of(m: I64, rows: int) -> U8:
    """Classes of the rows."""
    return nb.carray(_pointer(m[_ROW_CLASS]), (rows,), np.uint8)  # type: ignore[no-any-return]


@nb.njit(inline="always")
def slot_class_of(m: I64) -> U8:
    """Classes of the positions, [pieces, positions]."""
    return nb.carray(_pointer(m[_SLOT_CLASS]), (m[_PIECES], m[_ENDS]), np.uint8)  # type: ignore[no-any-return]


@nb.njit(inline="always")
def slots_of(m: I64) -> I32:
    """Columns of the positions, [pieces, positions]."""
    return nb.carray(_pointer(m[_SLOTS]), (m[_PIECES], m[_ENDS]), np.int32)  # type: ignore[no-any-return]


@nb.njit(inline="always")
def col_index_of(m: I64, cols: int) -> I16:
    """Scales of the columns."""
    return nb.carray(_pointer(m[_COL_INDEX]), (cols,), np.int16)  # type: ignore[no-any-return]


@nb.njit(inline="always")
def row_index_of(m: I64, rows: int) -> I16:
    """Scales of the rows."""
    return nb.carray(_pointer(m[_ROW_INDEX]), (rows,), np.int16)  # type: ignore[no-any-return]


@nb.njit(inline="always")
def row_index_neg_of(m: I64, rows: int) -> I16:
    """Scales of the rows' negative weights."""
    return nb.carray(_pointer(m[_ROW_INDEX_NEG]), (rows,), np.int16)  # type: ignore[no-any-return]


@nb.njit(inline="always")
def order_of(m: I64, rows: int) -> U16:
    """Rows by falling length of their streams, [pieces, rows]."""
    return nb.carray(_pointer(m[_ORDER]), (m[_PIECES], rows), np.uint16)  # type: ignore[no-any-return]


@nb.njit(inline="always")
def table_of(m: I64) -> U8:
    """The contexts' tables."""
    return nb.carray(_pointer(m[_TABLE_OF]), (CONTEXTS,), np.uint8)  # type: ignore[no-any-return]


@nb.njit(inline="always")
def entries_of(m: I64) -> U64:
    """`Tables.entries`."""
    return nb.carray(_pointer(m[_ENTRIES]), (m[_TABLES] << m[_BITS],), np.uint64)  # type: ignore[no-any-return]


@nb.njit(inline="always")
def lane_entries_of(m: I64) -> U32:
    """`Tables.lane_entries`."""
    return nb.carray(_pointer(m[_LANE_ENTRIES]), (m[_TABLES] << m[_BITS],), np.uint32)  # type: ignore[no-any-return]


@nb.njit(cache=True, nogil=True)
def bases(m: I64) -> I32:
    """Place of each context's table in the entries, int32 [64]."""
    found, tables = np.zeros(64, np.int32), table_of(m)
    for c in range(CONTEXTS):
        found[c] = np.int32(tables[c]) << m[_BITS]
    return found
