# ruff: noqa: ANN001, ANN201 -- arguments of device code have no Python types
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
"""Larger batches: decode an expert once into scratch, then multiply it with tiles of its tokens.
Device code; twin `project_torch`.

Replaces `for e in experts with tokens: y[pairs(e)] = x[pairs(e)] @ W[e].T`. Experts are taken
`slots` at a time, so that their decoded form stays in the L2 cache; experts without tokens cost one
comparison.

Shapes: xs [pairs, depth] bf16 or float32 (x of each pair times the column scales, in the order of
its expert's coded columns, pairs sorted by expert), codes [slots, rows, depth] int8 or of the same
type, y [pairs, rows] float32 or the output's type, in the original order of pairs.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first"])
def grouped_dot(
    xs, codes, row_scale, offsets, order, y, first, experts, rows, depth,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """y[order[m], r] = xs[m] . codes[slot, r] * row_scale[e, r] for the pairs m of expert e = first
    + slot.

    Grid (tiles of ROWS, slots, shares of an expert's tiles of tokens); `offsets` int32 [experts +
    1] are the bounds of each expert's pairs. depth must be a multiple of DEPTH.
    EXACT: float32 operands are multiplied as such, not in tf32.
    """
    slot = tl.program_id(1)
    e = first + slot
    if e >= experts:
        return
    begin = tl.load(offsets + e)
    count = tl.load(offsets + e + 1) - begin
    first_row = tl.program_id(0) * ROWS
    r = tl.arange(0, ROWS)
    k = tl.arange(0, DEPTH)
    m = tl.arange(0, TOKENS)
    real = r < rows - first_row
    scale = tl.load(row_scale + e.to(tl.int64) * rows + first_row + r, mask=real, other=0.0)
    scale = scale.to(tl.float32)
    codes += (slot.to(tl.int64) * rows + first_row) * depth
    y += first_row
    for tile in range(tl.program_id(2), tl.cdiv(count, TOKENS), tl.num_programs(2)):
        here = m < count - tile * TOKENS
        start = (begin + tile * TOKENS).to(tl.int64)
        x = xs + start * depth
        # rows first: bytes become numbers in registers, which is where this operand may come from
        total = tl.zeros([ROWS, TOKENS], tl.float32)
        for d in range(0, depth, DEPTH):
            a = tl.load(x + m[None, :] * depth + (d + k)[:, None], mask=here[None, :], other=0.0)
            w = tl.load(codes + r[:, None] * depth + (d + k)[None, :], mask=real[:, None], other=0)
            if EXACT:
                total += tl.dot(w.to(tl.float32), a.to(tl.float32), input_precision="ieee")
            else:
                total += tl.dot(w.to(a.dtype), a)
        pair = tl.load(order + start + m, mask=here, other=0).to(tl.int64)
        to = y + pair[None, :] * rows + r[:, None]
        tl.store(
            to, (total * scale[:, None]).to(y.dtype.element_ty), mask=here[None, :] & real[:, None]
        )
