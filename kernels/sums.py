# ruff: noqa: ANN001, ANN201 -- arguments of device code have no Python types
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
"""What stands behind `qmoe.kernels.matvec`: partial sums are added in a fixed order, over the
segments of a pair and over the pairs of a token. Device code; names and shapes as there.

`slots` int32 [pairs] is g * B + b of each pair, -1 if its expert is outside 0..E-1. With one pair a
group (DIRECT) the index of experts stands in its place: slot t belongs to pair t.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def rounded(v, HALF: tl.constexpr):
    """float32 rounded to nearest even as bf16 (1) or fp16 (2), or left alone (0); by bits, since
    the interpreter truncates to bf16.
    """
    if HALF == 1:
        bits = v.to(tl.uint32, bitcast=True)
        even = bits + 0x7FFF + ((bits >> 16) & 1)
        return tl.where(v == v, (even & 0xFFFF0000).to(tl.float32, bitcast=True), v)
    elif HALF == 2:
        return v.to(tl.float16).to(tl.float32)
    else:
        return v


@triton.jit
def slot_of(slots, pair, experts, DIRECT: tl.constexpr):
    """Where the partial sums of a pair are, -1 for nowhere."""
    slot = tl.load(slots + pair)
    if DIRECT:
        return tl.where((slot >= 0) & (slot < experts), pair, -1).to(tl.int32)
    else:
        return slot


@triton.jit
def slot_sum(partial, slot, element, rows, SLOTS: tl.constexpr, B: tl.constexpr, mask):
    """Sum over the P * S partial sums of a pair at row `element`; slot < 0 gives zeros."""
    at = tl.maximum(slot, 0).to(tl.int64)
    end = tl.where(slot >= 0, rows, 0)
    base = partial + ((at // B) * SLOTS * B + at % B) * rows + element
    total = tl.zeros(element.shape, tl.float32)
    for s in tl.static_range(SLOTS):
        total += tl.load(base + s * B * rows, mask=mask & (element < end), other=0.0)
    return total


@triton.jit
def sum_partials(
    partial, slots, y, experts, rows,
    SLOTS: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """y[pair, r] = sum of the pair's partial sums; grid (pairs, blocks of rows)."""
    pair = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = slot_of(slots, pair, experts, DIRECT)
    total = slot_sum(partial, slot, r, rows, SLOTS, B, r < rows)
    if y.dtype.element_ty == tl.bfloat16:
        total = rounded(total, 1)
    tl.store(y + pair * rows + r, total.to(y.dtype.element_ty), mask=r < rows)


@triton.jit
def sum_tokens(
    partial, slots, weights, out, experts, rows,
    K: tl.constexpr, SLOTS: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr,
    DIRECT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[n, r] = sum over k of weights[n, k] * y[n * K + k, r], in the order of k; grid (tokens,
    blocks of rows).
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    n = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(K):
        slot = slot_of(slots, n * K + k, experts, DIRECT)
        y = slot_sum(partial, slot, r, rows, SLOTS, B, r < rows)
        total += y * tl.load(weights + n * K + k).to(tl.float32)
    if out.dtype.element_ty == tl.bfloat16:
        total = rounded(total, 1)
    tl.store(out + n * rows + r, total.to(out.dtype.element_ty), mask=r < rows)
