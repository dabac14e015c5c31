"""Encoded experts as the kernels read them: one set of flat tensors per projection, built once when
a model is loaded.

The stored streams are bit-contiguous; a GPU wants the 32 lanes of a warp to read neighbouring
words. So the streams of a piece are sorted by their number of symbol groups, each 256 of them
(BLOCK_TILES * LANES) by their bits, each 32 of these become a *tile*, and its words are
interleaved: word k of lane l at first + 32 k + l. Sorting keeps lanes in step (about equal numbers
of groups) and words dense (about equal numbers of bits), interleaving makes a warp read its words
nearly in order. Before that, codes of 8 bits are rewritten to 7 (`qmoe.kernels.recode`).

A stream may be cut into S segments, each followed by a lane of its own: small layers need the
parallelism. Nothing is moved for it. With G the most groups of a stream of a block of 256, every
stream of the block is cut behind each k = ceil(G / S) groups; segment s are its groups s * k to
(s + 1) * k - 1, so the lanes of a segment are in step whatever their bits. Where a lane starts is
stored: its bit and its position, 8 bits each from the least of its tile where that is enough. A cut
may fall between the symbols of one weight; its sum then is in two partial sums.

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
from qmoe.codec.format.arrays import I32, I64
from qmoe.kernels.interleave import BLOCK_TILES, LANES, cut, interleave
from qmoe.kernels.recode import Recoding, Rewritten, recoding, rewrite

MAP_WIDTH = 128  # entries of a context map: row class + column class is below 126
MAX_ADVANCE = 63
MAX_ROWS = 65535 * LANES  # tiles are an axis of the grid
MAX_SEGMENTS = 8
SORTED_TILES = 8  # that are sorted by bits, not by groups, at most a quarter of a piece
MOST = 1 << 31  # elements of a tensor that int32 indices reach
GROUP_BITS = 15  # of a record: groups in the low bits, words a lane above
ALIGN = 16  # columns of a piece and widths are padded to so many: then loads are vectors

# like the built-in map; one of an executor makes use of all cores
Map = Callable[..., Iterable[Any]]


@dataclass(frozen=True)
class PackedProjection:
    """One projection of all experts of a layer, e.g. gate and up together: [E] matrices [rows,
    cols], in kernel form.

    With P pieces, S segments, tiles = ceil(rows / 32), an expert has NP = P * S * tiles programs;
    program ((p * S) + s) * tiles + t is segment s of tile t. `stored` is span + 1 rounded up to
    ALIGN; span is the largest of all experts. Scales have six bits of mantissa (`qmoe.types`), so
    they are exact in bfloat16.

    Attributes:
        experts, rows, cols: E and the shape of every matrix (rows are outputs).
        pieces, segments: P, S.
        over: groups with which a weight may go on behind a cut.
        width: positions that an input vector needs per piece (x at position p + 1, zeros
            elsewhere), a multiple of ALIGN.
        limits: the different code limits L among the experts; kernels run once for each, usually
            there is one.
        wide: lookup entries are 32 bits instead of 16 (some symbol adds more than 31).
        words: int32 [n], interleaved.
        records: int32 [E, P * tiles, 2]: first word of a tile; the most groups of its streams and
            of those behind it in its piece | words a lane << GROUP_BITS.
        lanes: int16 or int32 [E, P * tiles, 32], row, `rows` for a lane without one.
        row_classes: uint8 like lanes.
        cuts: int32 [E, P, S - 1, tiles], [1] if S = 1. For a near start: the first word row of the
            segment's tile << FAR_BITS | the first position; else the row of `starts` with the high
            halves, less 2^31.
        starts: int16 [n, 32], [1, 32] if S = 1; row (as in cuts) of each segment but the first,
            then high halves. A near start is position | bit << 8, both counted from `cuts`,
            position NEAR for a stream that has ended; a far one in two halves position | bit <<
            FAR_BITS, counted from the tile.
        classes: uint8 [E, P, stored], class of the column that is next at a position.
        columns: int16 or int32 [E, P, stored], column at a position, -1 where there is none
            (position 0, virtual columns and behind the last).
        scales: bfloat16 like columns, the column's scale, 0 where there is none.
        context_maps: int32 [groups, 128], first lookup entry of the table of each context, counted
            from the group's first.
        expert_info: int32 [E, 4]: code limit L, first entry of the expert's context map, first
            lookup entry of its group, span.
        lut: int16 or int32 [entries + 4096], see `qmoe.kernels.device`.
        row_scale: bfloat16 [E, rows]; row_scale_neg: the same for negative codes, or None.
    """

    experts: int
    rows: int
    cols: int
    pieces: int
    segments: int
    over: int
    width: int
    limits: tuple[int, ...]
    wide: bool
    words: Tensor
    records: Tensor
    lanes: Tensor
    row_classes: Tensor
    cuts: Tensor
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
        """Tiles of a piece."""
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
        shape = [self.experts, self.rows, self.cols, self.pieces, self.segments, self.over]
        return [*shape, self.width, int(self.wide), *self.limits]

    @classmethod
    def from_parts(cls, tensors: Sequence[Tensor], numbers: Sequence[int]) -> "PackedProjection":
        """Inverse of `tensors` and `numbers`."""
        values: dict[str, Tensor | None] = dict(zip(_TENSORS, tensors, strict=True))
        if not tensors[-1].numel():
            values["row_scale_neg"] = None
        experts, rows, cols, pieces, segments, over, width, wide, *limits = numbers
        shape = experts, rows, cols, pieces, segments, over, width
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


_TENSORS = [f.name for f in fields(PackedProjection)][9:]


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
    parts = list(run(lambda n, m: _tiles(groups[n], m, segments), numbers, layouts))
    info = np.zeros((len(matrices), 4), np.int32)
    for e, (n, m) in enumerate(zip(numbers, layouts, strict=True)):
        info[e] = groups[n].new.limit, n * MAP_WIDTH, bases[n], m.span
    span = max(m.span for m in layouts)
    latch = max(g.new.latch for g in groups)
    negative = [m.row_scale if m.row_scale_neg is None else m.row_scale_neg for m in layouts]
    return PackedProjection(
        experts=len(matrices),
        rows=first.rows,
        cols=first.cols,
        pieces=first.pieces,
        segments=segments,
        over=max(p.over for p in parts),
        width=-(-(span + 1 + MAX_ADVANCE * latch) // ALIGN) * ALIGN,
        limits=tuple(sorted({g.new.limit for g in groups})),
        wide=wide,
        words=_words(parts, run),
        records=torch.from_numpy(np.stack([p.records for p in parts]).astype(np.int32)),
        **_lanes(layouts, parts),
        **_starts(parts, segments),
        **_columns(layouts, -(-(span + 1) // ALIGN) * ALIGN),
        context_maps=torch.from_numpy(maps),
        expert_info=torch.from_numpy(info),
        lut=torch.from_numpy(lut),
        row_scale=torch.stack([m.row_scale for m in layouts]).bfloat16(),
        row_scale_neg=torch.stack(negative).bfloat16()
        if any(m.row_scale_neg is not None for m in layouts)
        else None,
    )


def _check(matrices: Sequence[tuple[Tables, ParsedMatrix]], segments: int) -> None:
    if not matrices or not 1 <= segments <= MAX_SEGMENTS:
        raise ValueError(
            f"need at least one matrix and 1 to {MAX_SEGMENTS} segments, "
            f"got {len(matrices)} and {segments}"
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
        "scales": torch.from_numpy(scales).bfloat16(),
    }


@dataclass(frozen=True)
class _Tiles:
    """One matrix cut into tiles: records [P * tiles, 2] with words counted from 0, cuts [P, S - 1,
    tiles] with far rows counted from 0, the near starts and the far ones, and what its words are
    written from.
    """

    records: I64
    cuts: I32
    starts: NDArray[np.uint16]
    far: I64
    over: int
    words: int
    source: Rewritten
    order: I64  # [P, rows]

    def write(self, words: I32, base: int) -> None:
        """Writes the words at `base`, where the records then point."""
        self.records[:, 0] += base
        pieces = len(self.order)
        first = self.records[:, 0].reshape(pieces, -1)
        for p, order in enumerate(self.order):
            stream = order * pieces + p
            ends = np.stack([self.source.starts[stream], self.source.starts[stream + 1]], 1)
            interleave(self.source.words, ends, first[p].copy(), words)


def _tiles(how: Recoding, m: ParsedMatrix, segments: int) -> _Tiles:
    made = rewrite(how, m, segments > 1)
    tiles, pieces = -(-m.rows // LANES), m.pieces
    bits = np.diff(made.starts).reshape(m.rows, pieces)
    groups = made.groups.reshape(m.rows, pieces)
    mark = (np.cumsum(made.groups) - made.groups).reshape(m.rows, pieces)
    records = np.empty((pieces, tiles, 2), np.int64)
    orders = np.empty((pieces, m.rows), np.int64)
    inner = segments - 1
    cuts = np.empty((pieces, inner, tiles), np.int32)
    starts = np.empty((pieces, inner * tiles, LANES), np.uint16)
    found, over, words = [np.empty((0, LANES), np.int64)], 0, 0
    for p in range(pieces):
        order = orders[p] = _order(bits[:, p], groups[:, p])
        most = np.maximum.reduceat(groups[order, p], np.arange(0, m.rows, LANES))
        most = np.maximum.accumulate(most[::-1])[::-1]
        rows = np.maximum.reduceat(bits[order, p], np.arange(0, m.rows, LANES)) + 31 >> 5
        rows = np.maximum(rows, 1)
        records[p, :, 0] = words + LANES * (np.cumsum(rows) - rows)
        records[p, :, 1] = most | rows << GROUP_BITS
        words += LANES * int(rows.sum())
        if segments > 1:
            steps = -(-most[np.arange(tiles) // BLOCK_TILES * BLOCK_TILES] // segments)
            at = np.stack([mark[order, p], groups[order, p]], 1)
            far = np.empty((inner * tiles, LANES), np.int64)
            n, more = cut(made.marks, at, steps, m.span, cuts[p], starts[p], far)
            cuts[p][cuts[p] < 0] += sum(map(len, found))
            found.append(far[:n])
            over = max(over, more)
    flat = records.reshape(-1, 2), cuts, starts.reshape(-1, LANES), np.concatenate(found)
    return _Tiles(*flat, over, words, made, orders)


def _order(bits: I64, groups: I64) -> I64:
    """The streams of a piece by lane: by falling groups in blocks, in a block by falling bits."""
    block = max(1, min(SORTED_TILES, len(groups) // LANES // 4)) * LANES
    number = np.empty(len(groups), np.int64)
    number[np.argsort(-groups, kind="stable")] = np.arange(len(groups)) // block
    return np.lexsort((-bits, number))


def _words(parts: Sequence[_Tiles], run: Map) -> Tensor:
    """The words of all experts, to which their records then point."""
    sizes = np.cumsum([0, *(p.words for p in parts)])
    # a lane looks at two words behind its last
    total = int(sizes[-1]) + 3 * LANES
    if total >= MOST:
        raise ValueError(f"{total} words in one projection; fewer than 2^31 are possible")
    words = np.zeros(total, np.int32)
    list(run(lambda p, base: p.write(words, int(base)), parts, sizes[:-1]))
    return torch.from_numpy(words)


def _lanes(layouts: Sequence[ParsedMatrix], parts: Sequence[_Tiles]) -> dict[str, Tensor]:
    """The tensors by lane: lanes, row_classes."""
    rows, pieces = layouts[0].rows, layouts[0].pieces
    shape = len(parts), pieces, -(-rows // LANES) * LANES
    lanes = np.full(shape, rows, np.int16 if rows < 1 << 15 else np.int32)
    classes = np.zeros(shape, np.uint8)
    for e, (m, p) in enumerate(zip(layouts, parts, strict=True)):
        lanes[e, :, :rows] = p.order
        classes[e, :, :rows] = m.row_class.numpy()[p.order]
    flat = len(parts), -1, LANES
    return {
        "lanes": torch.from_numpy(lanes.reshape(flat)),
        "row_classes": torch.from_numpy(classes.reshape(flat)),
    }


def _starts(parts: Sequence[_Tiles], segments: int) -> dict[str, Tensor]:
    """The tensors of the cuts: cuts, starts."""
    if segments == 1:
        none = torch.zeros(1, dtype=torch.int32), torch.zeros(1, LANES, dtype=torch.int16)
        return dict(zip(("cuts", "starts"), none, strict=True))
    cuts = np.stack([p.cuts for p in parts])
    far = [p.far >> 16 for p in parts]
    base = cuts.size
    for cut_of, rows in zip(cuts, far, strict=True):
        cut_of[cut_of < 0] += base
        base += len(rows)
    if base * LANES >= MOST:
        raise ValueError(f"{base * LANES} starts in one projection; fewer than 2^31 are possible")
    starts = np.concatenate([*(p.starts for p in parts), *(f.astype(np.uint16) for f in far)])
    return {"cuts": torch.from_numpy(cuts), "starts": torch.from_numpy(starts.view(np.int16))}


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
