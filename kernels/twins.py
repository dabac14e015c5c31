"""What the kernels mean, in torch: decoding, and y = W[expert] x for every (token, expert) pair."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qmoe.kernels.interleave import BLOCK_TILES, FAR_BITS, LANES, NEAR
from qmoe.kernels.pack import GROUP_BITS, MAP_WIDTH, PackedProjection


@dataclass(frozen=True)
class Lanes:
    """Where the lanes of an expert's programs start: int64 [NP * 32] each.

    Attributes:
        row, row_class: row is `rows` for a lane without one.
        word, end: first word of a lane, and of what is behind its tile.
        used: bits of that word which are not the lane's.
        position: before the first group.
        steps: groups, the most of the lanes of its program.
    """

    row: Tensor
    row_class: Tensor
    word: Tensor
    end: Tensor
    used: Tensor
    position: Tensor
    steps: Tensor


def lanes_of(p: PackedProjection, expert: int) -> Lanes:
    """The lanes of an expert, by program."""
    shape = p.pieces, p.segments, p.tiles, LANES
    base, packed = p.records[expert].long().view(p.pieces, 1, p.tiles, 1, 2).unbind(-1)
    device, span = base.device, int(p.expert_info[expert, 3])
    most, rows = packed & ((1 << GROUP_BITS) - 1), packed >> GROUP_BITS
    tile = torch.arange(p.tiles, device=device)
    inner = -(-most[:, :, tile // BLOCK_TILES * BLOCK_TILES] // p.segments)
    s = torch.arange(p.segments, device=device)[None, :, None, None]
    steps = torch.minimum(most - s * inner, inner).clamp(min=0)
    position, bit = torch.zeros((2, *shape), dtype=torch.long, device=device)
    if p.segments > 1:
        record = p.cuts[expert].long().unsqueeze(-1)
        n = p.cuts[0].numel()
        near = p.starts[expert * n : (expert + 1) * n].long() & 0xFFFF
        near = near.view(p.pieces, p.segments - 1, p.tiles, LANES)
        step = near & NEAR
        position[:, 1:] = torch.where(step == NEAR, span, (record & ((1 << FAR_BITS) - 1)) + step)
        bit[:, 1:] = (record >> FAR_BITS) * 32 + (near >> 8)
        far = record < 0
        high = p.starts[torch.where(far, record + (1 << 31), 0)].long()[..., 0, :] & 0xFFFF
        whole = near | high << 16
        position[:, 1:] = torch.where(far, whole & ((1 << FAR_BITS) - 1), position[:, 1:])
        bit[:, 1:] = torch.where(far, whole >> FAR_BITS, bit[:, 1:])
    lane = torch.arange(LANES, device=device)
    by_lane = (p.pieces, 1, p.tiles, LANES)
    found = (
        p.lanes[expert].long().view(by_lane),
        p.row_classes[expert].long().view(by_lane),
        base + (bit >> 5) * LANES + lane,
        base + rows * LANES,
        bit & 31,
        position,
        steps,
    )
    return Lanes(*(t.expand(shape).reshape(-1) for t in found))


def decode_torch(p: PackedProjection, expert: int) -> Tensor:
    """Codes of one expert by position: float32 [rows, pieces, span + 1], the weight of the column
    at position i at index i.

    The definition of the device decoders: one step of this loop is one symbol of every lane.
    """
    lanes = lanes_of(p, expert)
    device = lanes.row.device
    piece = torch.arange(len(lanes.row), device=device) // LANES // p.tiles // p.segments
    base, top = int(lanes.word.min()), int(lanes.end.max()) + LANES
    words = p.words[base:top].long() & 0xFFFFFFFF
    at, end, used, pos = lanes.word - base, lanes.end - base, lanes.used, lanes.position
    lut = p.lut.long() & (0xFFFFFFFF if p.wide else 0xFFFF)
    bits, first_map, first_entry, limit = p.expert_info[expert].tolist()
    context_map = p.context_maps.flatten()[first_map : first_map + MAP_WIDTH].long()
    stored = p.stored
    codes = torch.zeros(p.rows + 1, p.pieces, p.width + 1, device=device)
    value_bits, bias = (8, 128) if p.wide else (6, 32)
    for step in range(int(lanes.steps.max())):
        classes = p.classes[expert, piece, pos.clamp(max=stored - 1)].long()
        table = first_entry + context_map[lanes.row_class + classes]
        low = torch.where(at < end, words[at.clamp(max=words.numel() - 33)], 0)
        high = torch.where(at + 32 < end, words[(at + 32).clamp(max=words.numel() - 1)], 0)
        window = low >> used | (high << (32 - used)) & 0xFFFFFFFF
        for _ in range(32 // bits):
            entry = lut[table + (window & ((1 << bits) - 1))]
            length = entry >> (6 + value_bits)
            window, used = window >> length, used + length
            pos = pos + (entry & 63)
            value = (entry >> 6 & ((1 << value_bits) - 1)) - bias
            real = (step < lanes.steps) & (pos < limit)
            codes.index_put_(
                (lanes.row, piece, torch.where(real, pos, p.width)), value.float(), accumulate=True
            )
        pos = pos.clamp(max=limit)
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
    scale = p.row_scale[expert].float()[:, None]
    if p.row_scale_neg is not None:
        scale = torch.where(
            codes < 0, p.row_scale_neg[expert].float()[:, None, None], scale[:, :, None]
        ).flatten(1)
    values = (codes * p.scales[expert].float()).flatten(1) * scale
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
