"""What the kernels mean, in torch: decoding, and y = W[expert] x for every (token, expert) pair."""

import torch
from torch import Tensor

from qmoe.kernels.interleave import LANES
from qmoe.kernels.pack import MAP_WIDTH, NO_ROW, POSITION_BITS, PackedProjection


def lanes_of(p: PackedProjection, expert: int) -> Tensor:
    """Row | class of every lane, int64 [NP * 32]: those of a piece, for each of its segments."""
    lanes = p.lanes[expert].view(p.pieces, 1, -1).expand(-1, p.segments, -1)
    return lanes.flatten().long()


def segment_starts(p: PackedProjection, expert: int, steps: Tensor) -> tuple[Tensor, Tensor]:
    """First position and number of groups of every lane, int64 [NP * 32] each; `steps` are the
    groups of its program.
    """
    starts = p.starts[expert].flatten().long()
    if p.starts.dtype == torch.int16:
        starts = starts & 0xFFFF
    return starts & ((1 << POSITION_BITS) - 1), steps - (starts >> POSITION_BITS)


def decode_torch(p: PackedProjection, expert: int) -> Tensor:
    """Codes of one expert by position: float32 [rows, pieces, span + 1], the weight of the column
    at position i at index i.

    The definition of the device decoders: one step of this loop is one symbol of every lane.
    """
    lanes = lanes_of(p, expert)
    row, row_class = lanes & NO_ROW, lanes >> 24
    program = torch.arange(lanes.numel(), device=lanes.device) // 32
    first, end, steps, limit = p.records[expert].long()[program].unbind(1)
    piece = program // p.tiles // p.segments
    at = first + torch.arange(lanes.numel(), device=lanes.device) % 32
    base, top = int(first.min()), int(end.max()) + LANES
    words = p.words[base:top].long() & 0xFFFFFFFF
    at, end = at - base, end - base
    lut = p.lut.long() & (0xFFFFFFFF if p.wide else 0xFFFF)
    bits, first_map, first_entry, _ = p.expert_info[expert].tolist()
    context_map = p.context_maps.flatten()[first_map : first_map + MAP_WIDTH].long()
    pos, left = torch.zeros_like(row), steps
    if p.segments > 1:
        pos, left = segment_starts(p, expert, steps)
    stored = p.stored
    codes = torch.zeros(p.rows + 1, p.pieces, p.width + 1, device=lanes.device)
    used = torch.zeros_like(row)
    place, value_bits, bias = row.clamp(max=p.rows), 8 if p.wide else 6, 128 if p.wide else 32
    for step in range(int(steps.max())):
        classes = p.classes[expert, piece, pos.clamp(max=stored - 1)].long()
        table = first_entry + context_map[row_class + classes]
        low = torch.where(at < end, words[at.clamp(max=words.numel() - 33)], 0)
        high = torch.where(at + 32 < end, words[(at + 32).clamp(max=words.numel() - 1)], 0)
        window = low >> used | (high << (32 - used)) & 0xFFFFFFFF
        for _ in range(32 // bits):
            entry = lut[table + (window & ((1 << bits) - 1))]
            length = entry >> (6 + value_bits)
            window, used = window >> length, used + length
            pos = pos + (entry & 63)
            value = (entry >> 6 & ((1 << value_bits) - 1)) - bias
            real = (step < steps) & (pos < limit)
            codes.index_put_(
                (place, piece, torch.where(real, pos, p.width)), value.float(), accumulate=True
            )
        pos = torch.minimum(pos, limit)
        left = left - 1
        if p.segments > 1:
            pos = torch.where(left > 0, pos, limit)
        at, used = at + (used & 32), used & 31
    codes[:, :, 0] = 0
    return codes[:-1, :, :stored]


def weights_torch(p: PackedProjection, expert: int) -> Tensor:
    """Dense weights of one expert, float32 [rows, cols]: codes * column scale * row scale, as
    `QuantizedMatrix.dequantize`.
    """
    return dense_of(p, expert, decode_torch(p, expert))


def dense_of(p: PackedProjection, expert: int, codes: Tensor) -> Tensor:
    """Weights [rows, cols] from codes by position [rows, pieces, stored]."""
    scale = p.row_scale[expert][:, None]
    if p.row_scale_neg is not None:
        scale = torch.where(
            codes < 0, p.row_scale_neg[expert][:, None, None], scale[:, :, None]
        ).flatten(1)
    values = (codes * p.scales[expert]).flatten(1) * scale
    column = p.columns[expert].long().flatten()
    out = torch.zeros(p.rows, p.cols + 1, device=codes.device)
    out[:, torch.where(column < 0, p.cols, column)] = values
    return out[:, :-1].contiguous()


def project_torch(p: PackedProjection, x: Tensor, index: Tensor, fan: int) -> Tensor:
    """Twin of `project`: ``y[t] = W[index[t]] @ x[t // fan]`` in float32, zeros where index is
    outside 0..E-1.
    """
    y = torch.zeros(index.numel(), p.rows, device=x.device)
    for e in sorted(set(index.tolist())):
        if 0 <= e < p.experts:
            t = torch.where(index == e)[0]
            y[t] = x[t // fan].float() @ weights_torch(p, e).T
    return y.to(x.dtype)
