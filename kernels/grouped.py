"""Larger batches: decode an expert once into scratch, then multiply it with tiles of its tokens. Device code; twin `project_torch`.

Replaces `for e in experts with tokens: y[pairs(e)] = x[pairs(e)] @ W[e].T`. Experts are taken `slots` at a time, so that their decoded
form stays in the L2 cache; experts without tokens cost one comparison.

Shapes: xs [pairs, depth] bf16 or float32 (x of each pair times the column scales, in the order of its expert's coded columns, pairs sorted by
expert), codes [slots, rows, depth] of the same type, y [pairs, rows] float32 or the output's type, in the original order of pairs.
"""

import triton
import triton.language as tl


@triton.jit
def grouped_dot(
    xs, codes, row_scale, offsets, order, y, first, experts, rows, depth,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """y[order[m], r] = xs[m] . codes[slot, r] * row_scale[e, r] for the pairs m of expert e = first + slot.

    Grid (tiles of ROWS, slots, SPLIT); `offsets` int32 [experts + 1] are the bounds of each expert's pairs. depth must be a multiple of DEPTH.
    EXACT: float32 operands are multiplied as such, not in tf32.
    """
    slot = tl.program_id(1)
    e = first + slot
    if e >= experts:
        return
    begin = tl.load(offsets + e)
    count = tl.load(offsets + e + 1) - begin
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, DEPTH)
    scale = tl.load(row_scale + e.to(tl.int64) * rows + r, mask=r < rows, other=0.0)
    w_at = codes + (slot.to(tl.int64) * rows + r.to(tl.int64)[None, :]) * depth + k[:, None]
    for tile in range(tl.program_id(2), tl.cdiv(count, TOKENS), SPLIT):
        m = tile * TOKENS + tl.arange(0, TOKENS)
        here = m < count
        x_at = xs + (begin + m).to(tl.int64)[:, None] * depth + k[None, :]
        total = tl.zeros([TOKENS, ROWS], tl.float32)
        for d in range(0, depth, DEPTH):
            a = tl.load(x_at + d, mask=here[:, None], other=0.0)
            w = tl.load(w_at + d, mask=(r < rows)[None, :], other=0.0)
            if EXACT:
                total += tl.dot(a.to(tl.float32), w.to(tl.float32), input_precision="ieee")
            else:
                total += tl.dot(a, w)
        pair = tl.load(order + begin + m, mask=here, other=0).to(tl.int64)
        to = y + pair[:, None] * rows + r[None, :]
        tl.store(to, (total * scale[None, :]).to(y.dtype.element_ty), mask=here[:, None] & (r < rows)[None, :])
