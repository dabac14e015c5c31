# ruff: noqa: ANN001, ANN201 -- arguments of device code have no Python types
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
"""`qmoe.kernels.decode` with tables and the decoded tile in shared memory, in Gluon: what runs on
NVIDIA GPUs where codes are single bytes.

The rows of a tile lie anywhere in an expert, and a lane writes one byte at a time: in global memory
every such byte is a sector of 32. Here a warp writes them to a tile of its own, 32 rows of a piece,
and copies whole rows out. So nothing has to be zeroed beforehand, and a stream is followed from its
beginning to its end whatever the cuts, whose segments lie one behind the other.

Triton's interpreter does not run it; tests/ptx does.
"""

import triton
import triton.language as tl

from qmoe.kernels.decode import count_of
from qmoe.kernels.device import begin, groups_of, latch, refill, symbol, window_of
from qmoe.kernels.shared import SUPPORTED, jit

if SUPPORTED:
    from triton.experimental.gluon import language as gl

MAX_DEPTH = 2048  # bytes of a row of a tile; a piece has up to 1024 columns
CHUNK = 128  # columns that are copied at a time


def fits(depth: int) -> bool:
    """Whether a tile of `depth` columns has room in shared memory."""
    return SUPPORTED and depth <= MAX_DEPTH


def room(depth: int) -> int:
    """Columns of the tile: a power of two."""
    size: int = triton.next_power_of_2(max(depth, CHUNK))
    return size


@jit
def decode_shared(
    words, records, lanes, row_classes, cuts, starts, classes, context_maps, expert_info, lut,
    out, counts, first, experts, rows, stored, depth, tiles, entry_bytes, word_bytes,
    L: tl.constexpr, ASM: tl.constexpr, ROOM: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One warp: the 32 streams of a tile of expert first + slot, if it has tokens; grid (P * tiles,
    slots), out int8 [slots, rows, P, depth]. Every element of a real row is written.
    """
    grid: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, 1], [1, 0])
    by_lane: gl.constexpr = gl.SliceLayout(1, grid)
    copy: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [1, 1], [1, 0])
    entry: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    e = first + gl.program_id(1)
    if count_of(counts, expert_info, e, experts, L) == 0:
        return
    lane = gl.arange(0, 32, layout=by_lane)
    zero = gl.zeros([32], gl.int32, layout=by_lane)
    tile, piece = gl.program_id(0) % tiles, gl.program_id(0) // tiles
    pieces = gl.num_programs(0) // tiles
    of_piece = e * pieces + piece
    limit = gl.load(expert_info + e * 4 + 3)
    _row, row_class, next_word, end, low, high, ahead, used, pos = begin(
        lane, zero, of_piece * tiles, 0, tile, 0, limit,
        words, records, lanes, row_classes, cuts, starts, word_bytes, 1, ASM,
    )  # fmt: skip
    steps = groups_of(records, of_piece * tiles, tile, 0, 1)
    context_map = context_maps + gl.load(expert_info + e * 4 + 1) + row_class
    lut += tl.multiple_of(gl.load(expert_info + e * 4 + 2), 128)
    classes += of_piece.to(gl.int64) * stored
    tables = gl.allocate_shared_memory(gl.int16, [16 << L], flat)
    tables.store(gl.load(lut + gl.arange(0, 16 << L, layout=entry)))
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 8, [1, 0])
    decoded = gl.allocate_shared_memory(gl.int8, [32, ROOM], swizzled)
    for k in gl.static_range(ROOM // STEP):
        decoded.slice(k * STEP, STEP, dim=1).store(gl.zeros([32, STEP], gl.int8, layout=copy))
    gl.barrier()
    # a lane with nothing to write writes its last byte again, at first the zero of column 0
    last = gl.minimum(limit - 1, depth) + zero
    before = pos
    total = gl.zeros([32], gl.float32, layout=by_lane)
    at = zero
    code = zero.to(gl.int8)
    for _ in range(steps):
        table = latch(lut, classes, context_map, pos, entry_bytes, word_bytes, L, ASM, True)
        for _u in gl.static_range(32 // L):
            window = window_of(low, high, used)
            advance, value, length = symbol(tables, table, window, entry_bytes, L, False, ASM, True)
            used += length
            pos += advance
            total = gl.where(advance == 0, total + value, value)
            write = (value != 0) & (pos > before) & (pos <= last)
            at = gl.where(write, pos - 1, at)
            code = gl.where(write, (total * (1.0 / 64)).to(gl.int8), code)
            decoded.scatter(gl.expand_dims(code, 1), gl.expand_dims(at, 1), axis=1)
        pos = gl.minimum(pos, limit)
        next_word, low, high, ahead, used = refill(
            words, next_word, end, low, high, ahead, used, word_bytes, ASM
        )
    gl.barrier()
    r = gl.arange(0, 32, layout=gl.SliceLayout(1, copy))
    c = gl.arange(0, STEP, layout=gl.SliceLayout(0, copy))
    to = gl.load(lanes + (of_piece * tiles + tile) * 32 + r).to(gl.int32)
    out += ((gl.program_id(1).to(gl.int64) * rows + to) * pieces + piece)[:, None] * depth
    for k in gl.static_range(ROOM // STEP):
        part = decoded.slice(k * STEP, STEP, dim=1).load(copy)
        inside = (to < rows)[:, None] & (c + k * STEP < depth)[None, :]
        gl.store(out + (c + k * STEP)[None, :], part, mask=inside)
