# ruff: noqa: ANN001, ANN201 -- arguments of device code have no Python types
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
"""What stands in front of `qmoe.kernels.matvec`: its inputs in the order of the coded columns, from
a layer's input or from the gate between the projections. Device code; names and shapes as there.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qmoe.kernels.device import expert_of
from qmoe.kernels.sums import rounded, slot_sum


@triton.jit
def pair_of(group_pairs, group, b, B: tl.constexpr, MEMBERS: tl.constexpr):
    """Pair at place b of a group, -1 if there is none; without MEMBERS a group is its pair."""
    if MEMBERS:
        return tl.load(group_pairs + group * B + b)
    else:
        return group.to(tl.int32)


@triton.jit(do_not_specialize=["experts", "cols", "fan"])
def gather_inputs(
    x, group_expert, group_pairs, columns, scales, xs, experts, cols, fan, stored, out_width,
    B: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr, MEMBERS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """xs[g, p, i, b] = x[pair(g, b) // fan, columns[e, p, i + OFFSET]] * scales[...]; grid (groups,
    P, blocks of out_width). Without MEMBERS (B = 1) a group is its pair.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    g = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    pieces = tl.num_programs(1)
    e = expert_of(group_expert, g, experts)
    i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    at = (tl.maximum(e, 0).to(tl.int64) * pieces + piece) * stored + i + OFFSET
    inside = (i + OFFSET < tl.where(e >= 0, stored, 0)) & (i < out_width)
    column = tl.load(columns + at, mask=inside, other=-1).to(tl.int32)
    scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
    to = ((g * pieces + piece) * out_width + i) * B
    for b in tl.static_range(B):
        pair = pair_of(group_pairs, g, b, B, MEMBERS)
        use = (column >= 0) & (column < tl.where(pair >= 0, cols, 0))
        token = (tl.maximum(pair, 0) // fan).to(tl.int64)
        v = tl.load(x + token * cols + column, mask=use, other=0.0).to(tl.float32) * scale
        if xs.dtype.element_ty == tl.bfloat16:
            v = rounded(v, 1)
        tl.store(xs + to + b, v.to(xs.dtype.element_ty), mask=i < out_width)


@triton.jit(do_not_specialize=["experts", "inner"])
def silu_inputs(
    partial, group_expert, group_pairs, columns, scales, xs, experts, inner, stored, width,
    SLOTS: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The gate between the projections, straight into the down projection's inputs; grid (groups,
    P of down, blocks of width).

    xs[g, p, i, b] = silu(gate) * up * scale at column = columns[e, p, i]: gate = row `column` of
    the first projection's sums, up = row inner + column. HALF rounds gate, up and the product to
    bf16 (1) or fp16 (2) first, as the uncompressed model does; 0 keeps float32.
    """
    g = tl.program_id(0).to(tl.int64)
    pieces = tl.num_programs(1)
    e = expert_of(group_expert, g, experts)
    i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    at = (tl.maximum(e, 0).to(tl.int64) * pieces + tl.program_id(1)) * stored + i
    inside = i < tl.where(e >= 0, stored, 0)
    column = tl.load(columns + at, mask=inside, other=-1).to(tl.int32)
    scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
    to = ((g * pieces + tl.program_id(1)) * width + i) * B
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for b in tl.static_range(B):
        pair = pair_of(group_pairs, g, b, B, B > 1)
        use = (column >= 0) & (column < tl.where(pair >= 0, inner, 0))
        slot = (g * B + b).to(tl.int32)
        gate = slot_sum(partial, slot, tl.maximum(column, 0), 2 * inner, SLOTS, B, use)
        up = slot_sum(partial, slot, tl.maximum(column, 0) + inner, 2 * inner, SLOTS, B, use)
        gate, up = rounded(gate, HALF), rounded(up, HALF)
        v = rounded(rounded(gate / (1.0 + tl.exp(-gate)), HALF) * up, HALF) * scale
        tl.store(xs + to + b, v.to(xs.dtype.element_ty), mask=i < width)
