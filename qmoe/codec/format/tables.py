"""The header of a group: what its matrices share, validated before anything is sized by it.

docs/format-codec.md is the specification; `write_tables` and `parse_tables` are its two directions.
"""

import zlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qmoe.codec.encoder.table_choice import MAX_TABLES
from qmoe.codec.format.arrays import I64, U8, U32, U64
from qmoe.codec.format.bits import BitReader, BitWriter
from qmoe.codec.format.classes import CONTEXTS
from qmoe.codec.format.geometry import MAX_COLS, MAX_ROWS
from qmoe.codec.format.huffman import (
    MAX_LENGTH,
    canonical_codes,
    code_lengths,
    fill_lookup,
    is_complete,
)
from qmoe.codec.format.sidedata import Field
from qmoe.codec.format.symbols import (
    MAX_ESCAPES,
    MAX_RUN,
    length_predictor,
    symbol_count,
    symbol_effects,
    value_bound,
)
from qmoe.errors import CorruptError

MAGIC = 0x31544D51  # "QMT1"
MIN_LENGTH = 8  # of the lookup index, bits
RUN = 64  # streams between two stored lengths
FIELDS = ("col_class", "row_class", "row_scale", "row_scale_neg", "col_scale", "run_bits")


@dataclass(frozen=True)
class Tables:
    """A group's header.

    Attributes:
        rows, cols: shape of every matrix of the group.
        limit: L, index width of the lookup tables in bits, 8..12; no code is longer.
        table_of: uint8 [CONTEXTS], table of each context (row class + column class).
        kinds: (R, V) of each table.
        escapes: X.
        lengths: code lengths of each table, uint8 [symbol count].
        fields: models of the side data by name, see FIELDS.
        checksum: crc32 of the blob; seeds the checksum of every matrix, so that a matrix fits its
            own tables only.
        lookup: uint32 [tables, 2^L]; entry = code length | advance << 8 | (value & 0xff) << 16 for
            the next L bits.
    """

    rows: int
    cols: int
    limit: int
    table_of: U8
    kinds: tuple[tuple[int, int], ...]
    escapes: int
    lengths: tuple[U8, ...]
    fields: dict[str, Field]
    checksum: int
    lookup: U32 = field(init=False, repr=False)

    def __post_init__(self) -> None:
        lookup = np.empty((len(self.kinds), 1 << self.limit), np.uint32)
        for t, (kind, lengths) in enumerate(zip(self.kinds, self.lengths, strict=True)):
            advance, value = symbol_effects(*kind, self.escapes)
            effect = advance.astype(np.uint32) << 8 | (value & 0xFF).astype(np.uint32) << 16
            entry = fill_lookup(lengths, self.limit)
            lookup[t] = effect[entry >> 4] | entry & 15
        object.__setattr__(self, "lookup", lookup)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "addresses"}  # a copy lies elsewhere

    @cached_property
    def entries(self) -> U64:
        """uint64 [tables << L]: code length | advance << 8 | bits of the value as float32 << 32."""
        value = (self.lookup >> 16).astype(np.uint8).view(np.int8).astype(np.float32)
        upper = value.view(np.uint32).astype(np.uint64) << np.uint64(32)
        return (upper | (self.lookup & np.uint32(0xFFFF)).astype(np.uint64)).reshape(-1)

    @cached_property
    def lane_entries(self) -> U32:
        """uint32 [tables << L]: code length | advance << 8 | value << 24."""
        low = self.lookup & np.uint32(0xFFFF)
        entries: U32 = (low | self.lookup >> np.uint32(16) << np.uint32(24)).reshape(-1)
        return entries

    @property
    def bytes_held(self) -> int:
        """Memory of the lookup tables in all three forms."""
        return 4 * self.lookup.nbytes

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """L, number of tables; then where table_of, entries and lane_entries lie."""
        entries = self.entries.ctypes.data, self.lane_entries.ctypes.data
        places = self.table_of.ctypes.data, *entries
        return (self.limit, len(self.kinds), *places)

    @property
    def latch(self) -> int:
        """Symbols that share a table: 32 // L, so that they fit in one 32-bit word."""
        return 32 // self.limit


def to_blob(words: U32, seed: int) -> tuple[Tensor, int]:
    """Appends the crc32 (seeded) of the words as a last word: uint8 tensor and checksum."""
    data = words.astype("<u4").tobytes()
    checksum = zlib.crc32(data, seed)
    blob = np.frombuffer(data + checksum.to_bytes(4, "little"), np.uint8)
    return torch.from_numpy(blob.copy()), checksum


def from_blob(blob: Tensor, least: int, magic: int, seed: int, check: bool) -> tuple[U32, int]:
    """Words of a blob without its checksum, and the checksum; CorruptError if either is wrong."""
    if blob.dtype != torch.uint8 or blob.ndim != 1 or blob.device.type != "cpu":
        got = f"{blob.dtype} {tuple(blob.shape)} on {blob.device}"
        raise ValueError(f"a blob is a flat uint8 CPU tensor, got {got}")
    data = blob.contiguous().numpy()
    if data.size % 4 or data.size < 4 * least:
        raise CorruptError(
            f"blob of {data.size} bytes; expected a multiple of 4 and at least {4 * least}"
        )
    words = np.frombuffer(data.tobytes(), "<u4")
    if words[0] != magic:
        raise CorruptError(f"blob starts with {int(words[0]):#010x}, expected {magic:#010x}")
    stored = int(words[-1])
    if check and stored != (actual := zlib.crc32(data[:-4].tobytes(), seed)):
        raise CorruptError(
            f"checksum of a blob of {data.size} bytes is {actual:#010x}, stored {stored:#010x}"
        )
    return words[:-1], stored


def write_tables(
    shape: tuple[int, int],
    limit: int,
    table_of: U8,
    kinds: tuple[tuple[int, int], ...],
    escapes: int,
    lengths: tuple[U8, ...],
    fields: dict[str, Field],
) -> tuple[Tensor, Tables]:
    """Header blob (uint8 tensor, a multiple of 4 bytes) and the parsed tables."""
    rows, cols = shape
    out = BitWriter()
    out.put(MAGIC, 32)
    out.put(rows, 24)
    out.put(cols, 16)
    out.put(limit, 4)
    out.put(len(kinds) - 1, 4)
    out.put(escapes, 3)
    for c in range(1, CONTEXTS):
        out.put(int(table_of[c] != table_of[c - 1]), 1)
    deltas = [_deltas(kind, escapes, n) for kind, n in zip(kinds, lengths, strict=True)]
    meta = code_lengths(
        np.bincount(np.concatenate(deltas), minlength=16).astype(np.int64), MAX_LENGTH
    )
    codes = canonical_codes(meta)
    for length in meta:
        out.put(int(length), 4)
    for (run, value), delta in zip(kinds, deltas, strict=True):
        out.put(run, 6)
        out.put(value, 7)
        for d in delta:
            out.put(int(codes[d]), int(meta[d]))
    for name in FIELDS:
        fields[name].write(out)
    blob, checksum = to_blob(out.words(), 0)
    return blob, Tables(rows, cols, limit, table_of, kinds, escapes, lengths, fields, checksum)


def _deltas(kind: tuple[int, int], escapes: int, lengths: U8) -> I64:
    source = length_predictor(*kind, escapes)
    predicted = np.where(source >= 0, lengths[source], 0).astype(np.int64)
    return (lengths - predicted) & 15


def parse_tables(blob: Tensor, check: bool = True) -> Tables:
    """Reads and validates a group header.

    Args:
        blob: uint8 [n] on the CPU, what `encode_group` returned.
        check: whether the checksum is verified; all other validation always happens.

    Raises:
        CorruptError: anything that `write_tables` cannot have written.
    """
    words, checksum = from_blob(blob, 8, MAGIC, 0, check)
    source = BitReader(words[1:])
    rows, cols, limit = source.get(24), source.get(16), source.get(4)
    count, escapes = source.get(4) + 1, source.get(3)
    if not 1 <= rows <= MAX_ROWS or not 1 <= cols <= MAX_COLS:
        raise CorruptError(f"group of {rows} x {cols} matrices")
    if not MIN_LENGTH <= limit <= MAX_LENGTH or escapes > MAX_ESCAPES:
        raise CorruptError(f"code limit {limit} bits, {escapes} escapes")
    table_of = np.cumsum([0, *(source.get(1) for _ in range(1, CONTEXTS))]).astype(np.uint8)
    if table_of[-1] != count - 1 or count > MAX_TABLES:
        raise CorruptError(f"contexts use {int(table_of[-1]) + 1} tables of {count}")
    meta = np.array([source.get(4) for _ in range(16)], np.uint8)
    if not is_complete(meta, MAX_LENGTH):
        raise CorruptError(f"incomplete code of lengths {meta.tolist()}")
    lookup = fill_lookup(meta, MAX_LENGTH)
    kinds, lengths = [], []
    for _ in range(count):
        kind, lengths_of = _read_table(source, limit, escapes, lookup)
        kinds.append(kind)
        lengths.append(lengths_of)
    fields = {name: Field.read(source) for name in FIELDS}
    source.finish()
    return Tables(
        rows, cols, limit, table_of, tuple(kinds), escapes, tuple(lengths), fields, checksum
    )


def _read_table(
    source: BitReader, limit: int, escapes: int, lookup: U32
) -> tuple[tuple[int, int], U8]:
    run, value = source.get(6), source.get(7)
    fits = symbol_count(run, value, escapes) <= 1 << limit and value <= value_bound(limit)
    if not 1 <= run <= MAX_RUN or value < 1 or not fits:
        raise CorruptError(
            f"table of runs to {run} and values to {value} with codes of {limit} bits"
        )
    lengths = np.zeros(symbol_count(run, value, escapes), np.uint8)
    for symbol, other in enumerate(length_predictor(run, value, escapes)):
        entry = int(lookup[source.peek(MAX_LENGTH)])
        source.get(entry & 15)
        lengths[symbol] = ((entry >> 4) + (int(lengths[other]) if other >= 0 else 0)) & 15
    if not is_complete(lengths, limit):
        raise CorruptError(f"table of runs to {run} and values to {value} has an incomplete code")
    return (run, value), lengths
