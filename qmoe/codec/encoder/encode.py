"""Encoder: a group of quantized matrices of one shape -> a header blob and a blob per matrix."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from qmoe.codec.decoder.matrix import side_values, write_matrix
from qmoe.codec.encoder.contexts import Prepared, prepare
from qmoe.codec.encoder.loops import emit, parse
from qmoe.codec.encoder.table_choice import Model, choose, cut
from qmoe.codec.format.arrays import I8, I64, U8, U16, U32
from qmoe.codec.format.classes import CONTEXTS
from qmoe.codec.format.geometry import MAX_COLS, MAX_ROWS
from qmoe.codec.format.huffman import canonical_codes, code_lengths
from qmoe.codec.format.sidedata import Field, fit_field
from qmoe.codec.format.symbols import symbol_count, symbol_effects
from qmoe.codec.format.tables import FIELDS, write_tables
from qmoe.types import SCALE_MAX, SCALE_MIN, QuantizedMatrix

_SMALL = 1 << 22  # weights; in smaller groups time matters less and side data more
_ROUNDS, _ROUNDS_SMALL = 1, 4  # of choosing row classes
_LOSS = 1.025  # no code limit saves 1.5 % of streams that are closer to their entropy than this
_LONGER = ((10, 0.985), (12, 0.97))  # longer code limits, worth it below this share of the size
_SLOPES = (0, 16, -16, 32, -32)  # grid indices per half octave that scale indices may follow


@dataclass(frozen=True)
class EncodedGroup:
    """What `encode_group` returns: flat uint8 tensors whose lengths are multiples of 4.

    Attributes:
        tables: the group header, for `parse_tables`.
        matrices: one blob per matrix, in the order given, for `parse_matrix`.
        scale_bits: how many bits of the blobs are scales, for `ideal_bits`.
    """

    tables: Tensor
    matrices: list[Tensor]
    scale_bits: int

    @property
    def stored_bits(self) -> int:
        """Bits of header and blobs, everything included."""
        return 8 * (self.tables.numel() + sum(m.numel() for m in self.matrices))


def encode_group(matrices: Sequence[QuantizedMatrix], limit: int | None = None) -> EncodedGroup:
    """Encodes matrices that share tables: a bounded batch of one projection of one layer.

    Args:
        matrices: at least one, on the CPU, all of one shape [rows, cols], 1 <= cols <= 65535; codes
            may be any int8.
        limit: longest code in bits, 8..12; None chooses 8 unless longer codes save more than 1.5 %.

    Returns:
        The encoded group. The same matrices give the same bytes.

    Raises:
        ValueError: no matrix, different shapes, an empty matrix, one beyond the format's limits or
            a scale index outside the grid.
    """
    codes = _checked(matrices)
    rounds = _ROUNDS if sum(c.size for c in codes) > _SMALL else _ROUNDS_SMALL
    streams, histogram = prepare(codes, rounds)
    max_size = max(int(np.abs(s.value.astype(np.int16)).max(initial=0)) for s in streams)
    limit, model = _choose(histogram, max_size, limit)
    table_of = model.table_of(CONTEXTS)
    counts = np.zeros(len(model.kinds) << 12, np.int64)
    parsed = [_parse(s, model, table_of, 32 // limit, counts) for s in streams]
    sizes = [symbol_count(*kind, model.escapes) for kind in model.kinds]
    lengths = tuple(
        code_lengths(c[:n], limit) for c, n in zip(counts.reshape(-1, 4096), sizes, strict=True)
    )
    written = _emit(parsed, model, lengths)
    fields = _fields(matrices, streams, [bits for _, bits in written])
    kinds, escapes, shape = tuple(model.kinds), model.escapes, codes[0].shape
    blob, tables = write_tables(shape, limit, table_of, kinds, escapes, lengths, fields)
    blobs = [
        write_matrix(tables, m, s.classes.row, s.classes.col, words, bits)
        for m, s, (words, bits) in zip(matrices, streams, written, strict=True)
    ]
    return EncodedGroup(blob, [b for b, _ in blobs], sum(bits for _, bits in blobs))


def _checked(matrices: Sequence[QuantizedMatrix]) -> list[I8]:
    if not matrices:
        raise ValueError("a group needs at least one matrix")
    shape = tuple(matrices[0].codes.shape)
    for m in matrices:
        if tuple(m.codes.shape) != shape:
            raise ValueError(
                f"matrices of one group must have one shape, got {shape} and {tuple(m.codes.shape)}"
            )
    if not 1 <= shape[0] <= MAX_ROWS or not 1 <= shape[1] <= MAX_COLS:
        raise ValueError(
            f"cannot encode {shape[0]} x {shape[1]}: 1 to {MAX_ROWS} rows, 1 to {MAX_COLS} columns"
        )
    for m in matrices:
        for scale in (m.row_scale, m.col_scale, m.row_scale_neg):
            if scale is not None and not SCALE_MIN <= scale.min() <= scale.max() <= SCALE_MAX:
                low, high = int(scale.min()), int(scale.max())
                raise ValueError(f"scale indices {low} to {high}, not {SCALE_MIN} to {SCALE_MAX}")
    return [np.ascontiguousarray(m.codes.numpy()) for m in matrices]


def _choose(histogram: I64, max_size: int, limit: int | None) -> tuple[int, Model]:
    """Code limit and model: 8 bits are fastest to decode, longer codes must be worth it."""
    first = cut(histogram)
    model = choose(histogram, first, limit or 8, max_size)
    if limit is not None or model.bits < _LOSS * model.entropy:
        return limit or 8, model
    for longer, share in _LONGER:
        other = choose(histogram, first, longer, max_size)
        if other.bits < share * model.bits:
            return longer, other
    return 8, model


def _parse(s: Prepared, model: Model, table_of: U8, latch: int, counts: I64) -> tuple[U16, I64]:
    """Symbols of a matrix and the first symbol of each stream; adds to counts [tables << 12]."""
    streams = s.start.size - 1
    least = min(v for _, v in model.kinds)
    beyond = int(np.count_nonzero(np.abs(s.value.astype(np.int16)) > least))
    bound = streams * (s.geometry.span + 1) + 12 * beyond  # 12 escapes of up to 2^4 reach 128
    symbols = np.empty(bound, np.uint16)
    first = np.empty(streams + 1, np.int64)
    kinds = np.array(model.kinds, np.int64)
    n = parse(
        s.position,
        s.value,
        s.start,
        s.classes.row,
        s.geometry.slot_class,
        table_of,
        kinds,
        model.escapes,
        latch,
        symbols,
        first,
        counts,
    )
    return symbols[:n].copy(), first


def _emit(
    parsed: list[tuple[U16, I64]], model: Model, lengths: tuple[U8, ...]
) -> list[tuple[U32, I64]]:
    """Payload words of every matrix and the bit at which each stream starts."""
    codes = np.zeros(len(model.kinds) << 12, np.uint32)
    last = np.zeros(len(model.kinds) << 12, np.uint16)
    for t, (kind, length) in enumerate(zip(model.kinds, lengths, strict=True)):
        base = t << 12
        codes[base : base + length.size] = canonical_codes(length) << 4 | length
        advance, _ = symbol_effects(*kind, model.escapes)
        for left in range(1, kind[0] + 1):  # the shortest code word that reaches the end
            fits = np.flatnonzero((advance >= left) & (length > 0))
            last[base + left] = base + fits[np.argmin(length[fits])] if fits.size else 0
    out = []
    for symbols, first in parsed:
        words, bits = np.empty(symbols.size * 12 // 32 + 2, np.uint32), np.empty_like(first)
        used = emit(symbols, first, codes, last, words, bits)
        out.append((words[: -(-used // 32)].copy(), bits))
    return out


def _fields(
    matrices: Sequence[QuantizedMatrix], streams: list[Prepared], bits: list[I64]
) -> dict[str, Field]:
    """Models of the side data of a group."""
    values: dict[str, list[I64]] = {name: [] for name in FIELDS}
    predictors: dict[str, list[I64]] = {name: [] for name in FIELDS}
    for m, s, b in zip(matrices, streams, bits, strict=True):
        for name, value, predictor in side_values(m, s.classes.row, s.classes.col, b):
            values[name].append(value)
            predictors[name].append(predictor)
    slopes = {"row_scale": _SLOPES, "col_scale": _SLOPES, "row_scale_neg": (0, 1)}
    return {
        name: fit_field(
            values[name] or [np.zeros(1, np.int64)],
            predictors[name] or None,
            slopes.get(name, (0,)),
        )
        for name in FIELDS
    }
