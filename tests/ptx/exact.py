"""What the kernels must give, bit for bit: every lane's chain of fused multiply-adds in the order
of its symbols, over the groups of its segment, from the definitions in `qmoe.kernels.pack` and
`qmoe.kernels.device`. No Triton.
"""

import dataclasses

import numpy as np
import torch

from ptx.arithmetic import fma
from qmoe.kernels.twins import lanes_of


def scaled_inputs(p, x, expert, token, kind):
    """The inputs of one (token, expert) pair by position: [P, width] of type `kind`."""
    out = torch.zeros(p.pieces, p.width)
    column = p.columns[expert].long()
    values = (
        torch.where(column >= 0, x[token].float()[column.clamp(min=0)], 0)
        * p.scales[expert].float()
    )
    out[:, : p.stored] = values.to(kind).float()
    return out.to(kind)


def partial_sums(p, xs, e):
    """Partial sums of expert e for inputs float32 [P, width, B]: float32 [P * S, B, rows]."""
    lanes = lanes_of(p, e)
    row, row_class, at, end, used, pos, steps = (
        getattr(lanes, f.name).numpy() for f in dataclasses.fields(lanes)
    )
    slot = np.arange(len(row)) // 32 // p.tiles
    piece = slot // p.segments
    words = p.words.numpy().view(np.uint32).astype(np.uint64)
    lut = p.lut.numpy().astype(np.int64) & (0xFFFFFFFF if p.wide else 0xFFFF)
    bits, first_map, first_entry, limit = p.expert_info[e].tolist()
    context_map = p.context_maps.flatten().numpy().astype(np.int64)[first_map:]
    value_bits, bias = (8, 128) if p.wide else (6, 32)
    classes = p.classes[e].numpy().astype(np.int64)
    rows = np.minimum(row, p.rows - 1)
    above = p.row_scale[e].float().numpy()[rows]
    below = above if p.row_scale_neg is None else p.row_scale_neg[e].float().numpy()[rows]
    total = np.zeros((len(row), xs.shape[2]), np.float32)
    for step in range(int(steps.max())):
        live = step < steps
        column_class = classes[piece, np.minimum(pos, classes.shape[1] - 1)]
        table = first_entry + context_map[row_class + column_class]
        low = words[np.minimum(at, len(words) - 33)]
        high = np.where(at + 32 < end, words[np.minimum(at + 32, len(words) - 1)], 0)
        both = low | high.astype(np.uint64) << np.uint64(32)
        for _ in range(32 // bits):
            window = (both >> used.astype(np.uint64)).astype(np.int64)
            entry = lut[table + (window & ((1 << bits) - 1))]
            used = used + (entry >> (6 + value_bits))
            pos = pos + (entry & 63)
            value = ((entry >> 6 & ((1 << value_bits) - 1)) - bias).astype(np.float32)
            value = value * np.float32(64)
            if p.row_scale_neg is not None:
                value = value * np.where(value < 0, below, above)
            for b in range(xs.shape[2]):
                x = xs[piece, np.minimum(pos, p.width - 1), b]
                total[:, b] = np.where(live, fma(value, x, total[:, b]), total[:, b])
        pos = np.minimum(pos, limit)
        at, used = at + 32 * (used >= 32), used & 31
    out = np.full((p.pieces * p.segments, xs.shape[2], p.rows), np.nan, np.float32)
    real = row < p.rows
    scale = np.float32(1 / 64) * (np.float32(1) if p.row_scale_neg is not None else above)
    for b in range(xs.shape[2]):
        out[slot[real], b, row[real]] = (total[:, b] * scale)[real]
    return out
