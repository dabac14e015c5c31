"""Encoded experts as the kernels read them: one set of flat tensors per projection, built once when
a model is loaded.

The stored streams are bit-contiguous; a GPU wants the 32 lanes of a warp to read neighbouring
words. So the streams of a matrix are sorted by length within a piece, each 32 of them become a
*program*, and their words are interleaved: word k of lane l at first + 32 k + l. Sorting keeps the
lanes of a program in step (equal lengths, equal classes), interleaving makes a program read its
words nearly in order. Before that, codes of 8 bits are rewritten to 7 (`qmoe.kernels.recode`).
A stream may also be cut into S segments, each with a lane of its own: small layers need the
parallelism, at 6 bytes per segment.

Everything here is checked or clamped on the host, once; the kernels trust these tensors except
`words`, whatever they hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmoe.codec import ParsedMatrix, Tables
from qmoe.errors import CorruptError
from qmoe.kernels.interleave import cut_streams, interleave
from qmoe.kernels.recode import PADDING, shorten

LANES = 32
NO_ROW = 0xFFFFFF
MAP_WIDTH = 128  # entries of a context map: row class + column class is below 126
MAX_ADVANCE = 63
MAX_STEPS = 32767
RECORD = 4  # int32s per program: first word, end word, groups, span


@dataclass(frozen=True)
class PackedProjection:
    """One projection of all experts of a layer, e.g. gate and up together: [E] matrices [rows,
    cols], in kernel form.

    With P pieces, S segments, tiles = ceil(rows / 32), NP = P * S * tiles programs per expert;
    program ((p * S) + s) * tiles + t.

    Attributes:
        experts, rows, cols: E and the shape of every matrix (rows are outputs).
        pieces, segments: P, S.
        width: positions that an input vector needs per piece (x at position p + 1, zeros
            elsewhere).
        limits: the different code limits L among the experts; kernels run once for each, usually
            there is one.
        wide: lookup entries are 32 bits instead of 16 (some symbol adds more than 31).
        words: int32 [n], interleaved.
        records: int32 [E, NP, 4], see RECORD.
        lanes: int32 [E, NP, 32], row | row class << 24; NO_ROW for a lane without a row.
        starts: int32 [E, NP, 32] if S > 1 else [1]: first position | groups << 16.
        classes: uint8 [E, P, span + 1], class of the column that is next at a position; span is the
            largest of all experts.
        columns: int16 or int32 [E, P, span + 1], column at a position, -1 where there is none
            (position 0 and virtual columns).
        scales: float32 like columns, the column's scale, 0 where there is none.
        context_maps: int32 [groups, 128], first lookup entry of the table of each context, counted
            from the group's first, whose number is in the last place (no context reaches it).
        expert_maps: int32 [E], group of an expert.
        expert_limits: int32 [E], code limit L of an expert.
        lut: int16 or int32 [entries + 4096], see `qmoe.kernels.device`.
        row_scale: float32 [E, rows]; row_scale_neg: the same for negative codes, or None.
    """

    experts: int
    rows: int
    cols: int
    pieces: int
    segments: int
    width: int
    limits: tuple[int, ...]
    wide: bool
    words: Tensor
    records: Tensor
    lanes: Tensor
    starts: Tensor
    classes: Tensor
    columns: Tensor
    scales: Tensor
    context_maps: Tensor
    expert_maps: Tensor
    expert_limits: Tensor
    lut: Tensor
    row_scale: Tensor
    row_scale_neg: Tensor | None

    @property
    def tiles(self) -> int:
        """Programs per piece and segment."""
        return -(-self.rows // LANES)

    @property
    def programs(self) -> int:
        """Programs per expert, NP."""
        return self.pieces * self.segments * self.tiles

    def tensors(self) -> list[Tensor]:
        """The tensors in the order of the attributes; an absent one is an empty tensor."""
        values = [getattr(self, f.name) for f in fields(self)[_FIRST_TENSOR:]]
        return [self.row_scale.new_empty(0) if v is None else v for v in values]

    def numbers(self) -> list[int]:
        """The non-tensor attributes as a flat list; `from_parts` is the way back."""
        return [
            self.experts,
            self.rows,
            self.cols,
            self.pieces,
            self.segments,
            self.width,
            int(self.wide),
            *self.limits,
        ]

    @classmethod
    def from_parts(cls, tensors: Sequence[Tensor], numbers: Sequence[int]) -> "PackedProjection":
        """Inverse of `tensors` and `numbers`."""
        names = [f.name for f in fields(cls)[_FIRST_TENSOR:]]
        values: dict[str, Tensor | None] = dict(zip(names, tensors, strict=True))
        if not tensors[-1].numel():
            values["row_scale_neg"] = None
        experts, rows, cols, pieces, segments, width, wide, *limits = numbers
        return cls(
            experts,
            rows,
            cols,
            pieces,
            segments,
            width,
            tuple(limits),
            bool(wide),
            **cast(Any, values),
        )

    def to(self, device: torch.device | str) -> "PackedProjection":
        """A copy with all tensors on `device`."""
        names = [f.name for f in fields(self)[_FIRST_TENSOR:] if getattr(self, f.name) is not None]
        return replace(self, **{n: getattr(self, n).to(device) for n in names})

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors())


_FIRST_TENSOR = [f.name for f in fields(PackedProjection)].index("words")


def pack_projection(
    matrices: Sequence[tuple[Tables, ParsedMatrix]], segments: int = 1
) -> PackedProjection:
    """Kernel form of one projection of a layer.

    Args:
        matrices: (group header, parsed matrix) per expert, in expert order, all of one shape;
            experts of a group share the Tables object.
        segments: lanes per stream, 1..8.

    Returns:
        The projection, on the CPU.

    Raises:
        ValueError: no experts, different shapes, or `segments` out of range.
        CorruptError: a stream does not end where it should, or has more than MAX_STEPS groups.
    """
    if not matrices or not 1 <= segments <= 8:
        raise ValueError(
            f"need at least one matrix and 1 to 8 segments, got {len(matrices)} and {segments}"
        )
    first = matrices[0][1]
    for _, m in matrices:
        if (m.rows, m.cols, m.pieces) != (first.rows, first.cols, first.pieces):
            raise ValueError(
                f"experts of a projection must have one shape, "
                f"got {(m.rows, m.cols)} and {(first.rows, first.cols)}"
            )
    matrices = shorten(matrices)
    groups = list({id(t): t for t, _ in matrices}.values())
    span = max(m.span for _, m in matrices)
    wide = any(int(np.abs(_values(t)).max()) > 31 for t in groups)
    lut, maps = _lookup(groups, wide)
    parts = [_programs(t, m, segments) for t, m in matrices]
    sizes = np.cumsum([0, *(p.words for p in parts)])
    if sizes[-1] + 2 * LANES >= 1 << 31:
        raise ValueError(f"{int(sizes[-1])} words in one projection; at most 2^31 - 64")
    words = np.zeros(int(sizes[-1]) + 2 * LANES, np.int32)
    for part, base, (_, m) in zip(parts, sizes, matrices, strict=False):
        part.records[:, :2] += base
        for record, start, bits in zip(part.records, part.start, part.bits, strict=True):
            interleave(_words(m), start, bits, int(record[0]), words)
    columns = np.full((len(matrices), first.pieces, span + 1), -1, np.int32)
    classes = np.zeros(columns.shape, np.uint8)
    scales = np.zeros(columns.shape, np.float32)
    for e, (_, m) in enumerate(matrices):
        slots = m.slots.numpy()
        columns[e, :, : m.span + 1] = np.where(slots < m.cols, slots, -1)
        classes[e, :, : m.span + 1] = m.slot_class.numpy()
        scales[e] = np.where(columns[e] >= 0, m.col_scale.numpy()[columns[e]], 0)
    negative = [m.row_scale if m.row_scale_neg is None else m.row_scale_neg for _, m in matrices]
    starts = np.stack([p.starts for p in parts]) if segments > 1 else np.zeros(1, np.int32)
    return PackedProjection(
        experts=len(matrices),
        rows=first.rows,
        cols=first.cols,
        pieces=first.pieces,
        segments=segments,
        width=-(-(span + 1 + MAX_ADVANCE * max(t.latch for t in groups)) // 8) * 8,
        limits=tuple(sorted({t.limit for t in groups})),
        wide=wide,
        words=torch.from_numpy(words),
        records=torch.from_numpy(np.stack([p.records for p in parts]).astype(np.int32)),
        lanes=torch.from_numpy(np.stack([p.lanes for p in parts])),
        starts=torch.from_numpy(starts),
        classes=torch.from_numpy(classes),
        columns=torch.from_numpy(columns.astype(np.int16) if first.cols < 1 << 15 else columns),
        scales=torch.from_numpy(scales),
        context_maps=torch.from_numpy(maps),
        expert_maps=torch.tensor(
            [[id(g) for g in groups].index(id(t)) for t, _ in matrices], dtype=torch.int32
        ),
        expert_limits=torch.tensor([t.limit for t, _ in matrices], dtype=torch.int32),
        lut=torch.from_numpy(lut),
        row_scale=torch.stack([m.row_scale for _, m in matrices]),
        row_scale_neg=torch.stack(negative)
        if any(m.row_scale_neg is not None for _, m in matrices)
        else None,
    )


@dataclass(frozen=True)
class _Programs:
    """One matrix cut into programs: records [NP, 4] with words counted from 0, lanes and starts
    [NP, 32], bit strings [NP][<= 32].
    """

    records: NDArray[np.int64]
    lanes: NDArray[np.int32]
    starts: NDArray[np.int32]
    start: list[NDArray[np.int64]]
    bits: list[NDArray[np.int64]]
    words: int


def _words(m: ParsedMatrix) -> NDArray[np.uint32]:
    return m.padded_words(PADDING)


def _programs(tables: Tables, m: ParsedMatrix, segments: int) -> _Programs:
    row_class = m.row_class.numpy()
    cuts = np.empty((m.rows * m.pieces, segments + 1, 3), np.int64)
    bad = cut_streams(
        _words(m),
        m.stream_start.numpy(),
        row_class,
        m.slot_class.numpy(),
        tables.table_of,
        tables.lookup.ravel(),
        tables.limit,
        cuts,
    )
    if bad >= 0 or cuts[:, -1, 2].max() > MAX_STEPS:
        raise CorruptError(
            f"stream {bad} does not end at its last bit, or one has more than {MAX_STEPS} groups"
        )
    by_row = cuts.reshape(m.rows, m.pieces, segments + 1, 3)
    tiles = -(-m.rows // LANES)
    count = m.pieces * segments * tiles
    out = _Programs(
        np.zeros((count, RECORD), np.int64),
        np.full((count, LANES), NO_ROW, np.int32),
        np.zeros((count, LANES), np.int32),
        [],
        [],
        0,
    )
    words = 0
    for p in range(m.pieces):
        for s in range(segments):
            here, after = by_row[:, p, s], by_row[:, p, s + 1]
            steps, bits = after[:, 2] - here[:, 2], after[:, 0] - here[:, 0]
            # equal steps save waiting, equal bits save padding: pairs of steps, then bits
            order = np.lexsort((-bits, -(steps // 2)))
            for t in range(tiles):
                rows, i = order[t * LANES : (t + 1) * LANES], (p * segments + s) * tiles + t
                length = max(
                    2, -(-int(bits[rows].max()) // 32)
                )  # a lane loads two words before it looks
                out.records[i] = words, words + LANES * length, steps[rows].max(), m.span
                out.lanes[i, : rows.size] = rows | row_class[rows].astype(np.int32) << 24
                out.starts[i] = m.span
                out.starts[i, : rows.size] = here[rows, 1] | steps[rows] << 16
                out.start.append(here[rows, 0])
                out.bits.append(bits[rows])
                words += LANES * length
    return replace(out, words=words)


def _values(t: Tables) -> NDArray[np.int64]:
    """Value of every lookup entry."""
    return (t.lookup >> 16 & 0xFF).astype(np.uint8).view(np.int8).astype(np.int64)


def _lookup(groups: Sequence[Tables], wide: bool) -> tuple[NDArray[np.generic], NDArray[np.int32]]:
    """Device lookup tables of all groups and their context maps."""
    entries, maps, base = [], np.zeros((len(groups), MAP_WIDTH), np.int32), 0
    for g, t in enumerate(groups):
        length, advance = t.lookup & 15, t.lookup >> 8 & 63
        value = _values(t) + (128 if wide else 32)
        entry = advance | value.astype(np.uint32) << 6 | length << (14 if wide else 12)
        entries.append(
            (
                entry.astype(np.uint32).view(np.int32)
                if wide
                else entry.astype(np.uint16).view(np.int16)
            ).ravel()
        )
        table = np.minimum(np.arange(MAP_WIDTH), t.table_of.size - 1)
        maps[g] = t.table_of[table].astype(np.int32) << t.limit
        maps[g, -1] = base
        base += entries[-1].size
    # a kernel may copy 16 tables of 8 bits at once, whichever group's it starts at
    entries.append(np.zeros(16 << 8, entries[0].dtype))
    return np.concatenate(entries), maps
