"""A matrix blob and its parsed form, from which CPU decoders and GPU kernels work.

docs/format-codec.md has the bits.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qmoe.codec.decoder.starts import find_starts
from qmoe.codec.format.arrays import F32, I32, I64, U8, U16, U32
from qmoe.codec.format.classes import CONTEXTS
from qmoe.codec.format.geometry import geometry, piece_count
from qmoe.codec.format.sidedata import Field, pack
from qmoe.codec.format.tables import RUN, Tables, from_blob, to_blob
from qmoe.errors import CorruptError
from qmoe.types import SCALE_MAX, SCALE_MIN, QuantizedMatrix, grid_scale

MAGIC = 0x314D4D51  # "QMM1"
SCALE_FIELDS = ("row_scale", "row_scale_neg", "col_scale")
PADDING_WORDS = 1  # behind the payload lies the checksum, so that decoders may look one word ahead

MOST_ORDERED = 1 << 16  # rows
_SIDE_PADDING = 4  # words of zeros behind a copy, so that damaged side data cannot be read past


@dataclass(frozen=True)
class ParsedMatrix:
    """A parsed matrix. All tensors are on the CPU.

    A stream s = row * pieces + piece starts at bit ``stream_start[s]`` of `words` (bit b is bit b %
    32 of word b // 32) with position 0. Before each group of `Tables.latch` symbols the table is
    ``table_of[row_class[row] + slot_class[piece, position]]``; a symbol adds its advance to the
    position, clamped to `span`, then its value to the weight of column ``slots[piece, position]``.
    The stream ends with the symbol that reaches `span`; what follows belongs to the next stream and
    may be decoded harmlessly, since slots[:, span] is no column.

    Attributes:
        rows, cols: shape.
        pieces: streams per row.
        span: C, end position of a stream; at most 1025.
        words: int32 [n + PADDING_WORDS], bit patterns of the little-endian payload words and of
            the checksum behind them; a view of the blob where its address allows, not a copy.
        stream_start: int32 [rows * pieces + 1], bit offsets; the last is the payload's length.
        row_class: uint8 [rows].
        slots: int32 [pieces, span + 1]; column whose weight ends at a position, `cols` where there
            is none.
        slot_class: uint8 [pieces, span + 1]; class of the column that comes next at a position.
        col_order: int32 [coded]; coded columns by falling class: position k of piece p is
            col_order[(k - 1) * pieces + p].
        order: uint16 [pieces, rows]; the rows by falling number of groups of their streams in a
            piece, as streams that are decoded side by side should end together. None of more rows
            than 16-bit numbers count.
        row_index, row_index_neg, col_index: int16 grid indices of the scales [rows], [rows] or
            None, [cols].
    """

    rows: int
    cols: int
    pieces: int
    span: int
    words: Tensor
    stream_start: Tensor
    row_class: Tensor
    slots: Tensor
    slot_class: Tensor
    order: U16 | None
    row_index: Tensor
    col_index: Tensor
    row_index_neg: Tensor | None

    @property
    def row_scale(self) -> Tensor:
        """float32 [rows]."""
        return grid_scale(self.row_index)

    @property
    def row_scale_neg(self) -> Tensor | None:
        """float32 [rows], of the negative weights, if they have scales of their own."""
        return None if self.row_index_neg is None else grid_scale(self.row_index_neg)

    @property
    def col_scale(self) -> Tensor:
        """float32 [cols]."""
        return grid_scale(self.col_index)

    @property
    def side_bytes(self) -> int:
        """Memory of everything but the payload, which belongs to the blob."""
        held = (self.stream_start, self.row_class, self.slots, self.slot_class, self.row_index)
        more = () if self.row_index_neg is None else (self.row_index_neg,)
        order = 0 if self.order is None else self.order.nbytes
        return order + sum(int(t.nbytes) for t in (*held, self.col_index, *more))

    @cached_property
    def arrays(self) -> tuple[U32, I32, U8, U8, I32]:
        """words (unsigned), stream_start, row_class, slot_class, slots, as the loops take them."""
        first = (self.words.numpy().view(np.uint32), self.stream_start.numpy())
        return *first, self.row_class.numpy(), self.slot_class.numpy(), self.slots.numpy()

    @property
    def scales(self) -> tuple[F32, F32, F32]:
        """col_scale, row_scale, row_scale_neg (the same object as row_scale if there is none)."""
        row, below = self.row_scale.numpy(), self.row_scale_neg
        return self.col_scale.numpy(), row, row if below is None else below.numpy()

    def __getstate__(self) -> dict[str, Any]:
        made = ("addresses", "arrays")  # a copy lies elsewhere
        return {k: v for k, v in vars(self).items() if k not in made}

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """The last word of the payload, pieces, positions of a piece; then where words,
        stream_start, row_class, slot_class, slots, col_index, row_index, row_index_neg (or
        row_index) and order (0 if there are too many rows for one) lie."""
        below = self.row_index if self.row_index_neg is None else self.row_index_neg
        scales = [t.numpy() for t in (self.col_index, self.row_index, below)]
        places = [a.ctypes.data for a in self.arrays] + [a.ctypes.data for a in scales]
        order = 0 if self.order is None else self.order.ctypes.data
        last = self.words.numel() - PADDING_WORDS - 1
        return (last, self.pieces, self.span + 1, *places, order)

    @property
    def col_order(self) -> Tensor:
        """Coded columns by falling class, int32 [coded]."""
        order = self.slots[:, 1:-1].T.flatten()
        return order[order < self.cols]


def write_matrix(
    tables: Tables,
    matrix: QuantizedMatrix,
    row_class: U8,
    col_class: U8,
    words: U32,
    stream_bits: I64,
) -> tuple[Tensor, int]:
    """Blob of a matrix, and how many of its bits are scales.

    Args:
        tables: its group's tables.
        matrix: scales are taken from it.
        row_class, col_class: classes [rows], [cols] as stored (column class 0 = not coded).
        words: payload, uint32 [ceil(stream_bits[-1] / 32)].
        stream_bits: int64 [rows * pieces + 1], bit offset of every stream.

    Returns:
        uint8 [n], n a multiple of 4, and the bits of row, negative row and column scales.
    """
    negative = matrix.row_scale_neg
    strings, scale_bits = [], 0
    for name, values, predictor in side_values(matrix, row_class, col_class, stream_bits):
        strings.append(tables.fields[name].encode(values, predictor))
        scale_bits += int(strings[-1][1].sum(dtype=np.int64)) if name in SCALE_FIELDS else 0
    flag = np.array([negative is not None], np.uint64), np.ones(1, np.uint8)
    values = np.concatenate([flag[0], *(s[0] for s in strings)])
    widths = np.concatenate([flag[1], *(s[1] for s in strings)])
    side = np.zeros(-(-int(widths.sum(dtype=np.int64)) // 32) + 1, np.uint32)
    pack(values, widths, side)
    blob = np.concatenate([np.array([MAGIC], np.uint32), side[:-1], words])
    return to_blob(blob, tables.checksum)[0], scale_bits


def side_values(
    matrix: QuantizedMatrix, row_class: U8, col_class: U8, stream_bits: I64
) -> list[tuple[str, I64, I64]]:
    """Side data of a matrix in stored order: (field name, values, predictor)."""
    rows, cols = row_class.astype(np.int64), col_class.astype(np.int64)
    scale = matrix.row_scale.numpy().astype(np.int64)
    out = [
        ("col_class", cols, np.zeros_like(cols)),
        ("row_class", rows, np.zeros_like(rows)),
        ("row_scale", scale, rows),
    ]
    if matrix.row_scale_neg is not None:
        out.append(("row_scale_neg", matrix.row_scale_neg.numpy().astype(np.int64), scale))
    out.append(("col_scale", matrix.col_scale.numpy().astype(np.int64), cols))
    ends = np.append(np.arange(0, stream_bits.size - 1, RUN), stream_bits.size - 1)
    lengths = np.diff(stream_bits[ends])
    out.append(("run_bits", lengths, np.zeros_like(lengths)))
    return out


def parse_matrix(tables: Tables, blob: Tensor, check: bool = True) -> ParsedMatrix:
    """Reads and validates a matrix blob, walking all its streams to find where each starts.

    Args:
        tables: of the matrix's group.
        blob: uint8 [n] on the CPU.
        check: whether the checksum is verified; all other validation always happens.

    Raises:
        CorruptError: the blob is not a matrix of this group, sound to the last bit.
    """
    raw, _ = from_blob(blob, 3, MAGIC, tables.checksum, check)
    streams = tables.rows * piece_count(tables.cols)
    if streams > 32 * raw.size:  # each has at least one bit; nothing is sized by rows before
        raise CorruptError(f"blob of {4 * raw.size + 4} bytes for {streams} streams")
    words = np.concatenate([raw[1:], np.zeros(_SIDE_PADDING, np.uint32)])
    side = _SideReader(tables.fields, words)
    negative = side.flag()
    zeros = np.zeros(1, np.int64)
    col_class = side.take("col_class", tables.cols, zeros, 0, CONTEXTS)
    row_class = side.take("row_class", tables.rows, zeros, 0, CONTEXTS - 1)
    if not col_class.any() or row_class.max() + col_class.max() - 1 >= CONTEXTS:
        raise CorruptError(
            f"row classes to {row_class.max()} and column classes to {col_class.max()}"
        )
    row_scale = side.take("row_scale", tables.rows, row_class, SCALE_MIN, SCALE_MAX)
    row_neg = None
    if negative:
        row_neg = side.take("row_scale_neg", tables.rows, row_scale, SCALE_MIN, SCALE_MAX)
    col_scale = side.take("col_scale", tables.cols, col_class, SCALE_MIN, SCALE_MAX)
    run_bits = side.take("run_bits", -(-streams // RUN), zeros, 1, 1 << 31)
    payload = _payload(blob, side.finish() + 1)
    size, bits = payload.size - PADDING_WORDS, int(run_bits.sum())
    if -(-bits // 32) != size:
        raise CorruptError(f"streams of {bits} bits in {size} words")
    if bits >= 1 << 31 or (bits % 32 and payload[bits // 32] >> (bits % 32)):
        raise CorruptError(f"streams of {bits} bits, or set bits behind them")
    shape = geometry(col_class.astype(np.uint8))
    rows8 = row_class.astype(np.uint8)
    starts, groups = find_starts(tables, payload, run_bits, rows8, shape)

    def grid(index: I64) -> Tensor:
        return torch.from_numpy(index.astype(np.int16))

    return ParsedMatrix(
        rows=tables.rows,
        cols=tables.cols,
        pieces=shape.pieces,
        span=shape.span,
        words=torch.from_numpy(payload.view(np.int32)),
        stream_start=torch.from_numpy(starts),
        row_class=torch.from_numpy(rows8),
        slots=torch.from_numpy(shape.slots),
        slot_class=torch.from_numpy(shape.slot_class),
        order=_longest_first(groups.reshape(-1, shape.pieces)),
        row_index=grid(row_scale),
        col_index=grid(col_scale),
        row_index_neg=None if row_neg is None else grid(row_neg),
    )


def _longest_first(groups: U16) -> U16 | None:
    """`ParsedMatrix.order` of streams with so many groups of symbols, [rows, pieces]."""
    if len(groups) > MOST_ORDERED:
        return None
    # as they fall if all bits are turned; numpy sorts 16-bit numbers in linear time
    order: U16 = np.argsort(~groups.T, axis=1, kind="stable").astype(np.uint16)
    return order


def _payload(blob: Tensor, first: int) -> U32:
    """The words of a blob from `first` on, its checksum the last: a view if they are aligned."""
    data = blob.contiguous()
    if data.data_ptr() % 4:
        data = data.clone()
    words: U32 = data.numpy().view("<u4")[first:]
    return words


class _SideReader:
    """Takes the fields of a matrix from its words, one after another."""

    def __init__(self, fields: dict[str, Field], words: U32) -> None:
        self._fields, self._words, self._position = fields, words, 0

    def flag(self) -> bool:
        self._position += 1
        return bool(self._words[0] & 1)

    def take(self, name: str, count: int, predictor: I64, low: int, high: int) -> I64:
        values, self._position = self._fields[name].decode(
            self._words, self._position, count, predictor
        )
        if values.min() < low or values.max() > high:
            raise CorruptError(
                f"{name} from {values.min()} to {values.max()}, allowed {low} to {high}"
            )
        return values

    def finish(self) -> int:
        """Number of words of side data; the bits that pad the last one must be zero."""
        word, bit = divmod(self._position, 32)
        if bit and self._words[word] >> bit:
            raise CorruptError("set bits behind the side data")
        return word + (bit > 0)
