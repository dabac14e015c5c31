"""Encoded experts as the kernels read them: one set of flat tensors per projection, built once when
a model is loaded.

The stored streams are bit-contiguous; a GPU wants the 32 lanes of a warp to read neighbouring
words. So the streams of a matrix are sorted by length within a piece, each 32 of them become a
*program*, and their words are interleaved: word k of lane l at first + 32 k + l. Sorting keeps the
lanes of a program in step (equal lengths, equal classes), interleaving makes a program read its
words nearly in order. Before that, codes of 8 bits are rewritten to 7 (`qmoe.kernels.recode`).
A stream may also be cut into S segments, each with a lane of its own: small layers need the
parallelism, at 2 bytes and half a word per segment. All segments of a piece have its lanes in one
order.

Everything here is checked or clamped on the host, once; the kernels trust these tensors except
`words`, whatever they hold.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmoe.codec import ParsedMatrix, Tables
from qmoe.kernels.interleave import LANES, interleave, measure
from qmoe.kernels.recode import Recoding, recoding, rewrite

NO_ROW = 0xFFFFFF
MAP_WIDTH = 128  # entries of a context map: row class + column class is below 126
MAX_ADVANCE = 63
MAX_ROWS = 65535 * LANES  # tiles are an axis of the grid
RECORD = 4  # int32s per program: first word, end word, groups, span
POSITION_BITS = 11  # of a segment's start: a position is at most 1025
ALIGN = 16  # columns of a piece and widths are padded to so many: then loads are vectors

# like the built-in map; one of an executor makes use of all cores
Map = Callable[..., Iterable[Any]]


@dataclass(frozen=True)
class PackedProjection:
    """One projection of all experts of a layer, e.g. gate and up together: [E] matrices [rows,
    cols], in kernel form.

    With P pieces, S segments, tiles = ceil(rows / 32), NP = P * S * tiles programs per expert;
    program ((p * S) + s) * tiles + t. `stored` is span + 1 rounded up to ALIGN; span is the largest
    of all experts.

    Attributes:
        experts, rows, cols: E and the shape of every matrix (rows are outputs).
        pieces, segments: P, S.
        width: positions that an input vector needs per piece (x at position p + 1, zeros
            elsewhere), a multiple of ALIGN.
        limits: the different code limits L among the experts; kernels run once for each, usually
            there is one.
        wide: lookup entries are 32 bits instead of 16 (some symbol adds more than 31).
        words: int32 [n], interleaved.
        records: int32 [E, NP, 4], see RECORD; groups are the most of this program and those behind
            it of its piece and segment.
        lanes: int32 [E, P * tiles, 32], row | row class << 24; NO_ROW for a lane without a row.
        starts: int16 or int32 [E, NP, 32] if S > 1 else [1]: first position | (groups of the
            program - groups of the lane) << POSITION_BITS.
        classes: uint8 [E, P, stored], class of the column that is next at a position.
        columns: int16 or int32 [E, P, stored], column at a position, -1 where there is none
            (position 0, virtual columns and behind the last).
        scales: float32 like columns, the column's scale, 0 where there is none.
        context_maps: int32 [groups, 128], first lookup entry of the table of each context, counted
            from the group's first.
        expert_info: int32 [E, 4]: code limit L, first entry of the expert's context map, first
            lookup entry of its group, 0.
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
    expert_info: Tensor
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

    @property
    def stored(self) -> int:
        """Positions of a piece for which there are columns."""
        return self.columns.shape[2]

    def tensors(self) -> list[Tensor]:
        """The tensors in the order of the attributes; an absent one is an empty tensor."""
        values = [getattr(self, n) for n in _TENSORS]
        return [self.row_scale.new_empty(0) if v is None else v for v in values]

    def numbers(self) -> list[int]:
        """The non-tensor attributes as a flat list; `from_parts` is the way back."""
        shape = [self.experts, self.rows, self.cols, self.pieces, self.segments, self.width]
        return [*shape, int(self.wide), *self.limits]

    @classmethod
    def from_parts(cls, tensors: Sequence[Tensor], numbers: Sequence[int]) -> "PackedProjection":
        """Inverse of `tensors` and `numbers`."""
        values: dict[str, Tensor | None] = dict(zip(_TENSORS, tensors, strict=True))
        if not tensors[-1].numel():
            values["row_scale_neg"] = None
        experts, rows, cols, pieces, segments, width, wide, *limits = numbers
        shape = experts, rows, cols, pieces, segments, width
        return cls(*shape, tuple(limits), bool(wide), **cast(Any, values))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedProjection":
        """A copy with all tensors on `device`."""
        names = [n for n in _TENSORS if getattr(self, n) is not None]
        return replace(
            self, **{n: getattr(self, n).to(device, non_blocking=non_blocking) for n in names}
        )

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors())


_TENSORS = [f.name for f in fields(PackedProjection)][8:]


def pack_projection(
    matrices: Sequence[tuple[Tables, ParsedMatrix]], segments: int = 1, run: Map = map
) -> PackedProjection:
    """Kernel form of one projection of a layer.

    Args:
        matrices: (group header, parsed matrix) per expert, in expert order, all of one shape;
            experts of a group share the Tables object.
        segments: lanes per stream, 1..8.
        run: applies a function to every expert; `map`, or that of an executor of threads.

    Returns:
        The projection, on the CPU.

    Raises:
        ValueError: no experts, different shapes, too many rows, or `segments` out of range.
        CorruptError: a stream does not end where it should, or has more than MAX_STEPS groups.
    """
    _check(matrices, segments)
    first = matrices[0][1]
    group_of = {id(t): i for i, t in enumerate({id(t): t for t, _ in matrices}.values())}
    groups = [recoding(t) for t in {id(t): t for t, _ in matrices}.values()]
    numbers = [group_of[id(t)] for t, _ in matrices]
    layouts = [m for _, m in matrices]
    wide = any(int(np.abs(_values(g.new)).max()) > 31 for g in groups)
    lut, maps, bases = _lookup([g.new for g in groups], wide)
    parts = list(run(lambda n, m: _programs(groups[n], m, segments), numbers, layouts))
    sizes = np.cumsum([0, *(p.words for p in parts)])
    if sizes[-1] + 2 * LANES >= 1 << 31:
        raise ValueError(f"{int(sizes[-1])} words in one projection; at most 2^31 - 64")
    words = np.zeros(int(sizes[-1]) + 2 * LANES, np.int32)
    list(run(lambda p, base: p.write(words, int(base)), parts, sizes[:-1]))
    info = np.zeros((len(matrices), 4), np.int32)
    for e, n in enumerate(numbers):
        info[e, :3] = groups[n].new.limit, n * MAP_WIDTH, bases[n]
    span = max(m.span for m in layouts)
    latch = max(g.new.latch for g in groups)
    negative = [m.row_scale if m.row_scale_neg is None else m.row_scale_neg for m in layouts]
    return PackedProjection(
        experts=len(matrices),
        rows=first.rows,
        cols=first.cols,
        pieces=first.pieces,
        segments=segments,
        width=-(-(span + 1 + MAX_ADVANCE * latch) // ALIGN) * ALIGN,
        limits=tuple(sorted({g.new.limit for g in groups})),
        wide=wide,
        words=torch.from_numpy(words),
        records=torch.from_numpy(np.stack([p.records for p in parts]).astype(np.int32)),
        lanes=torch.from_numpy(np.stack([p.lanes for p in parts])),
        starts=_starts(parts, segments),
        **_columns(layouts, -(-(span + 1) // ALIGN) * ALIGN),
        context_maps=torch.from_numpy(maps),
        expert_info=torch.from_numpy(info),
        lut=torch.from_numpy(lut),
        row_scale=torch.stack([m.row_scale for m in layouts]),
        row_scale_neg=torch.stack(negative)
        if any(m.row_scale_neg is not None for m in layouts)
        else None,
    )


def _check(matrices: Sequence[tuple[Tables, ParsedMatrix]], segments: int) -> None:
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
    if first.rows > MAX_ROWS:
        raise ValueError(f"a projection of {first.rows} rows; kernels take up to {MAX_ROWS}")


def _columns(layouts: Sequence[ParsedMatrix], stored: int) -> dict[str, Tensor]:
    """The tensors by position: classes, columns, scales."""
    shape = len(layouts), layouts[0].pieces, stored
    columns, classes = np.full(shape, -1, np.int32), np.zeros(shape, np.uint8)
    scales = np.zeros(shape, np.float32)
    for e, m in enumerate(layouts):
        slots, n = m.slots.numpy(), m.span + 1
        columns[e, :, :n] = np.where(slots < m.cols, slots, -1)
        classes[e, :, :n] = m.slot_class.numpy()
        scales[e] = np.where(columns[e] >= 0, m.col_scale.numpy()[columns[e]], 0)
    narrow = layouts[0].cols < 1 << 15
    return {
        "classes": torch.from_numpy(classes),
        "columns": torch.from_numpy(columns.astype(np.int16) if narrow else columns),
        "scales": torch.from_numpy(scales),
    }


@dataclass(frozen=True)
class _Programs:
    """One matrix cut into programs: records [NP, 4] with words counted from 0, lanes [P * tiles,
    32], starts [NP, 32], and what its words are written from.
    """

    records: NDArray[np.int64]
    lanes: NDArray[np.int32]
    starts: NDArray[np.int32]
    words: int
    source: NDArray[np.uint32]
    cuts: NDArray[np.int64]  # [rows, P, S + 1, 3]
    order: NDArray[np.int64]  # [P, rows]

    def write(self, words: NDArray[np.int32], base: int) -> None:
        """Writes the words at `base`, where the records then point."""
        self.records[:, :2] += base
        pieces, segments = self.cuts.shape[1], self.cuts.shape[2] - 1
        first = self.records[:, 0].reshape(pieces, segments, -1)
        for p in range(pieces):
            for s in range(segments):
                cuts = self.cuts[:, p, s : s + 2]
                interleave(self.source, cuts, self.order[p], first[p, s].copy(), words)


def _programs(how: Recoding, m: ParsedMatrix, segments: int) -> _Programs:
    source, flat = rewrite(how, m, segments)
    cuts = flat.reshape(m.rows, m.pieces, segments + 1, 3)
    tiles = -(-m.rows // LANES)
    padded = tiles * LANES
    records = np.zeros((m.pieces, segments, tiles, RECORD), np.int64)
    lanes = np.full((m.pieces, padded), NO_ROW, np.int32)
    starts = np.full((m.pieces, segments, padded), m.span, np.int32)
    orders = np.empty((m.pieces, m.rows), np.int64)
    info = np.arange(m.rows, dtype=np.int32) | m.row_class.numpy().astype(np.int32) << 24
    words = 0
    for p in range(m.pieces):
        bits, groups = (cuts[:, p, -1, k] - cuts[:, p, 0, k] for k in (0, 2))
        # equal groups save waiting, equal bits save padding: groups in fours, then bits
        order = orders[p] = np.lexsort((-bits, -(groups // (4 * segments))))
        lanes[p, : m.rows] = info[order]
        for s in range(segments):
            sizes = np.empty((tiles, 2), np.int64)
            total = measure(cuts[:, p, s : s + 2], order, sizes)
            length = LANES * sizes[:, 0]
            record = records[p, s]
            record[:, 1] = words + np.cumsum(length)
            record[:, 0] = record[:, 1] - length
            record[:, 2] = np.maximum.accumulate(sizes[::-1, 1])[::-1]
            record[:, 3] = m.span
            own = cuts[order, p, s + 1, 2] - cuts[order, p, s, 2]
            short = np.repeat(record[:, 2], LANES)[: m.rows] - own
            starts[p, s, : m.rows] = cuts[order, p, s, 1] | short << POSITION_BITS
            words += total
    return _Programs(
        records.reshape(-1, RECORD), lanes.reshape(-1, LANES), starts.reshape(-1, LANES),
        words, source, cuts, orders,
    )  # fmt: skip


def _starts(parts: Sequence[_Programs], segments: int) -> Tensor:
    if segments == 1:
        return torch.zeros(1, dtype=torch.int16)
    starts = np.stack([p.starts for p in parts])
    if int(starts.max()) < 1 << 16:
        return torch.from_numpy(starts.astype(np.uint16).view(np.int16))
    return torch.from_numpy(starts)


def _values(t: Tables) -> NDArray[np.int64]:
    """Value of every lookup entry."""
    return (t.lookup >> 16 & 0xFF).astype(np.uint8).view(np.int8).astype(np.int64)


def _lookup(
    groups: Sequence[Tables], wide: bool
) -> tuple[NDArray[np.generic], NDArray[np.int32], list[int]]:
    """Device lookup tables of all groups, their context maps and the first entry of each."""
    entries, maps, bases = [], np.zeros((len(groups), MAP_WIDTH), np.int32), [0]
    bits, kind = (32, np.int32) if wide else (16, np.int16)
    for g, t in enumerate(groups):
        length, advance = t.lookup & 15, t.lookup >> 8 & 63
        value = (_values(t) + (128 if wide else 32)).astype(np.uint32)
        entry = advance | value << 6 | length << (14 if wide else 12)
        entries.append(entry.astype(f"uint{bits}").view(kind).ravel())
        table = np.minimum(np.arange(MAP_WIDTH), t.table_of.size - 1)
        maps[g] = t.table_of[table].astype(np.int32) << t.limit
        bases.append(bases[-1] + entries[-1].size)
    # a kernel may copy 16 tables of 8 bits at once, whichever group's it starts at
    entries.append(np.zeros(16 << 8, entries[0].dtype))
    return np.concatenate(entries), maps, bases
