"""The definition of the format in plain Python: a second decoder, slow and free of numba.

It trusts its input: checking is the work of `parse_tables` and `parse_matrix`, whose results must
    equal these.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qmoe.codec.format.arrays import I64
from qmoe.types import QuantizedMatrix

Code = dict[tuple[int, int], int]  # (length, code value with its first bit on top) -> symbol


class Bits:
    """A bit string, read from the front."""

    def __init__(self, data: bytes) -> None:
        self._value, self.position = int.from_bytes(data, "little"), 0

    def take(self, width: int) -> int:
        """An unsigned number of `width` bits."""
        self.position += width
        return (self._value >> (self.position - width)) & ((1 << width) - 1)

    def signed(self, width: int) -> int:
        """A two's complement number of `width` bits."""
        value = self.take(width)
        return value - (value >> (width - 1) << width)

    def symbol(self, code: Code) -> int:
        """The symbol of the next code word."""
        length, word = 0, 0
        while (length, word) not in code:
            length, word = length + 1, word << 1 | self.take(1)
        return code[length, word]

    def align(self) -> None:
        """Moves to the next whole word."""
        self.position += -self.position % 32


def canonical(lengths: list[int]) -> Code:
    """Canonical Huffman code of code lengths, 0 = unused."""
    code: Code = {}
    word = 0
    for length in range(1, 16):
        word <<= 1
        for symbol, n in enumerate(lengths):
            if n == length:
                code[length, word] = symbol
                word += 1
    return code


@dataclass(frozen=True)
class Table:
    """Code and meaning of the symbols of one table: effects[symbol] = (advance, value)."""

    code: Code
    effects: list[tuple[int, int]]


@dataclass(frozen=True)
class Side:
    """Model of a sequence of side data."""

    base: int
    slope: int
    step: int
    raw: int
    digits: int
    size: int
    code: Code


@dataclass(frozen=True)
class Header:
    """A group header."""

    rows: int
    cols: int
    limit: int
    table_of: list[int]
    tables: list[Table]
    fields: list[Side]


def effects(run: int, value: int, escapes: int) -> list[tuple[int, int]]:
    """(advance, value) of the symbols of a table."""
    out = [(run, 0)]
    out += [(r + 1, sign * v) for r in range(run) for v in range(1, value + 1) for sign in (1, -1)]
    return out + [(0, sign << k) for k in range(escapes) for sign in (1, -1)]


def read_table(bits: Bits, escapes: int, delta_code: Code) -> Table:
    """R, V and code lengths of a table."""
    run, value = bits.take(6), bits.take(7)
    table = effects(run, value, escapes)
    lengths: list[int] = []
    for s in range(len(table)):
        if s == 0:
            predicted = 0
        elif s == 1 or s % 2 == 0:
            predicted = lengths[s - 1]
        elif s <= 2 * value or s > 2 * run * value:
            predicted = lengths[s - 2]
        else:
            predicted = lengths[s - 2 * value]
        lengths.append((bits.symbol(delta_code) + predicted) % 16)
    return Table(canonical(lengths), table)


def read_header(blob: Tensor) -> Header:
    """Group header of a blob, uint8 [n]."""
    bits = Bits(bytes(blob.tolist()))
    bits.take(32)
    rows, cols, limit = bits.take(24), bits.take(16), bits.take(4)
    count, escapes = bits.take(4) + 1, bits.take(3)
    table_of = [0]
    for _ in range(62):
        table_of.append(table_of[-1] + bits.take(1))
    delta_code = canonical([bits.take(4) for _ in range(16)])
    tables = [read_table(bits, escapes, delta_code) for _ in range(count)]
    fields = []
    for _ in range(6):
        base, slope, step = bits.signed(32), bits.signed(8), bits.take(12)
        raw, digits, size = bits.take(5), bits.take(8) + 1, bits.take(3) + 1
        lengths = [bits.take(4) for _ in range(digits**size)] if digits > 1 else []
        fields.append(Side(base, slope, step, raw, digits, size, canonical(lengths)))
    return Header(rows, cols, limit, table_of, tables, fields)


def decode(tables_blob: Tensor, matrix_blob: Tensor) -> QuantizedMatrix:
    """Decodes a sound matrix blob of a sound group."""
    header = read_header(tables_blob)
    data = bytes(matrix_blob.tolist())
    bits = Bits(data)
    bits.take(32)
    negative = bits.take(1)

    def side(field: int, predictor: list[int]) -> list[int]:
        f = header.fields[field]
        out = []
        for at in range(0, len(predictor), f.size):
            symbol = bits.symbol(f.code) if f.digits > 1 else 0
            for p in predictor[at : at + f.size]:
                symbol, digit = divmod(symbol, f.digits)
                out.append(f.base + f.slope * p + f.step * (digit << f.raw | bits.take(f.raw)))
        return out

    col_class = side(0, [0] * header.cols)
    row_class = side(1, [0] * header.rows)
    row_scale = side(2, row_class)
    row_neg = side(3, row_scale) if negative else None
    col_scale = side(4, col_class)
    pieces = -(-header.cols // 1024)
    lengths = side(5, [0] * -(-header.rows * pieces // 64))
    bits.align()
    codes = np.zeros((header.rows, header.cols), np.int64)
    order = sorted((j for j in range(header.cols) if col_class[j]), key=lambda j: -col_class[j])
    places = [columns_of(order, col_class, piece, pieces) for piece in range(pieces)]
    start = bits.position
    for stream in range(header.rows * pieces):
        if stream % 64 == 0 and bits.position != start + sum(lengths[: stream // 64]):
            raise ValueError(f"stream {stream} starts at bit {bits.position - start}")
        row, piece = divmod(stream, pieces)
        read_stream(bits, header, codes[row], row_class[row], *places[piece])
    if bits.position != start + sum(lengths) or 8 * len(data) - bits.position >= 64:
        raise ValueError(f"streams end at bit {bits.position - start} of {8 * len(data) - start}")

    def grid(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int16)

    return QuantizedMatrix(
        torch.from_numpy(codes.astype(np.int8)),
        grid(row_scale),
        grid(col_scale),
        grid(row_neg) if row_neg else None,
    )


def columns_of(
    order: list[int], col_class: list[int], piece: int, pieces: int
) -> tuple[list[int], list[int]]:
    """Columns of a piece, and the classes of its positions, the one behind the last included."""
    columns = order[piece::pieces]
    length = -(-len(order) // pieces)
    classes = [col_class[j] - 1 for j in columns]
    classes += [col_class[order[-1]] - 1] * (length - len(classes))
    return columns, [*classes, classes[-1]]


def read_stream(
    bits: Bits,
    header: Header,
    weights: I64,
    row_class: int,
    columns: list[int],
    classes: list[int],
) -> None:
    """Decodes one stream into a row of weights, int64 [cols]; columns and classes are those of its
    piece.
    """
    position, span = 0, len(classes)
    while position < span:
        table = header.tables[header.table_of[row_class + classes[position]]]
        for _ in range(32 // header.limit):
            if position < span:
                advance, value = table.effects[bits.symbol(table.code)]
                position = min(position + advance, span)
                if 1 <= position <= len(columns):
                    weights[columns[position - 1]] += value
