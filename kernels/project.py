"""y = W[expert] x for every (token, expert) pair of a layer: launchers of the kernels, and the
torch twins that define them.
"""

import torch
import triton
from torch import Tensor

from qmoe.kernels import decode, grouped, matvec, pair_groups, shared
from qmoe.kernels.launch import LaunchPlan, batch_of, plan_of
from qmoe.kernels.pack import NO_ROW, PackedProjection

INTERPRETED = not isinstance(
    matvec.matvec, triton.JITFunction
)  # TRITON_INTERPRET=1: kernels run on CPU tensors
_BLOCK = 256
# the instruction counts rest on fused multiply-add; Triton's default is about to change
ONE_WARP = {"num_warps": 1, "enable_fp_fusion": True}
FOUR_WARPS = {"num_warps": 4, "enable_fp_fusion": True}


def decode_torch(p: PackedProjection, expert: int) -> Tensor:
    """Codes of one expert by position: float32 [rows, pieces, span + 1], the weight of the column
    at position i at index i.

    The definition of the device decoders: one step of this loop is one symbol of every lane.
    """
    lanes = p.lanes[expert].flatten().long()
    row, base = lanes & NO_ROW, lanes >> 24
    program = torch.arange(lanes.numel(), device=lanes.device) // 32
    first, end, steps, limit = p.records[expert].long()[program].unbind(1)
    piece = program // p.tiles // p.segments
    at = first + torch.arange(lanes.numel(), device=lanes.device) % 32
    words, lut = p.words.long() & 0xFFFFFFFF, p.lut.long() & (0xFFFFFFFF if p.wide else 0xFFFF)
    context_map, bits = p.context_maps[p.expert_maps[expert]].long(), int(p.expert_limits[expert])
    pos, left = torch.zeros_like(row), steps
    if p.segments > 1:
        starts = p.starts[expert].flatten().long()
        pos, left = starts & 0xFFFF, starts >> 16
    stored = p.classes.shape[2]
    codes = torch.zeros(p.rows + 1, p.pieces, p.width + 1, device=lanes.device)
    used = torch.zeros_like(row)
    place, value_bits, bias = row.clamp(max=p.rows), 8 if p.wide else 6, 128 if p.wide else 32
    for step in range(int(steps.max())):
        classes = p.classes[expert, piece, pos.clamp(max=stored - 1)].long()
        table = context_map[-1] + context_map[base + classes]
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
    return _dense(p, expert, decode_torch(p, expert))


def _dense(p: PackedProjection, expert: int, codes: Tensor) -> Tensor:
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


def inputs_type(x: Tensor) -> torch.dtype:
    """Type in which scaled inputs are held: bf16 for bf16 activations, float32 for the others (fp16
    would overflow).
    """
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


def decoder_args(p: PackedProjection) -> tuple[Tensor, ...]:
    """The tensors that every decoding kernel starts with."""
    return (
        p.words,
        p.records,
        p.lanes,
        p.starts,
        p.classes,
        p.context_maps,
        p.expert_maps,
        p.expert_limits,
        p.lut,
    )


def make_groups(index: Tensor, experts: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """`group_pairs_torch`, by a kernel if there are few pairs."""
    pairs = index.numel()
    if pairs > pair_groups.MAX_PAIRS:
        return pair_groups.group_pairs_torch(index, experts, batch)
    count = pair_groups.group_count(pairs, experts, batch)
    expert = torch.empty(count, dtype=torch.int32, device=index.device)
    members = torch.empty(count, batch, dtype=torch.int32, device=index.device)
    slots = torch.empty(pairs, dtype=torch.int32, device=index.device)
    block = max(16, triton.next_power_of_2(pairs))
    pair_groups.group_small[(1,)](
        index, expert, members, slots, pairs, count, experts, B=batch, BLOCK=block, **FOUR_WARPS
    )
    return expert, members, slots


def gathered(p: PackedProjection, x: Tensor, expert: Tensor, members: Tensor, fan: int) -> Tensor:
    """Scaled inputs of every group: [groups, P, width, B], see `matvec.gather_inputs`."""
    count, batch = members.shape
    xs = torch.empty(count, p.pieces, p.width, batch, dtype=inputs_type(x), device=x.device)
    matvec.gather_inputs[(triton.cdiv(p.width, _BLOCK), p.pieces, count)](
        x, expert, members, p.columns, p.scales, xs, p.experts, p.cols, fan, p.columns.shape[2],
        p.width,
        B=batch, OFFSET=0, BLOCK=_BLOCK, **FOUR_WARPS,
    )  # fmt: skip
    return xs


def partial_sums(p: PackedProjection, xs: Tensor, expert: Tensor, plan: LaunchPlan) -> Tensor:
    """float32 [groups, P * S, B, rows]: every segment's share of W[expert] xs."""
    count, _, _, batch = xs.shape
    bits = 8 * xs.element_size()
    partial = torch.empty(
        count, p.pieces * p.segments, batch, p.rows, dtype=torch.float32, device=xs.device
    )
    negative = p.row_scale if p.row_scale_neg is None else p.row_scale_neg
    for limit in p.limits:
        kernel, extra = matvec.matvec, {}
        if plan.shared and shared.fits(limit, p.wide):
            kernel, extra = shared.matvec_shared, {"ROOM": shared.room(p.width, batch, bits)}
        slots = p.pieces * p.segments
        kernel[(slots * triton.cdiv(p.tiles, plan.warps), count)](
            *decoder_args(p), p.row_scale, negative, xs, expert, partial,
            p.experts, p.rows, p.columns.shape[2], p.width, p.tiles, 4 if p.wide else 2,
            min(8, batch * bits // 8), 4, p.context_maps.shape[1],
            B=batch, X_BITS=bits, L=limit, S=p.segments, W=plan.warps, WIDE=p.wide,
            NEG=p.row_scale_neg is not None, ASM=plan.asm, **extra,
            num_warps=plan.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return partial


def project(
    p: PackedProjection,
    x: Tensor,
    index: Tensor,
    fan: int,
    plan: LaunchPlan | None = None,
    batch: int | None = None,
) -> Tensor:
    """``y[t] = W[index[t]] @ x[t // fan]`` by the kernels.

    Args:
        p: the projection, on x's device.
        x: bf16, fp16 or float32 [ceil(pairs / fan), cols], contiguous.
        index: integer [pairs]; outside 0..E-1 gives zeros.
        fan: pairs per row of x (top-k for the first projection, 1 for the second).
        plan, batch: override the choice of `plan_of` and `batch_of` (0 = grouped product).

    Returns:
        [pairs, rows] in x's dtype; sums are float32.
    """
    plan = plan or plan_of(x.device)
    pairs = index.numel()
    if pairs == 0:
        return x.new_zeros(0, p.rows)
    if batch is None:
        batch = batch_of(plan, -(-pairs // fan), fan, p.experts)
    if batch == 0:
        return project_grouped(p, x, index, fan, plan)
    expert, members, slots = make_groups(index, p.experts, batch)
    partial = partial_sums(p, gathered(p, x, expert, members, fan), expert, plan)
    y = torch.empty(pairs, p.rows, dtype=x.dtype, device=x.device)
    matvec.sum_partials[(triton.cdiv(p.rows, _BLOCK), pairs)](
        partial, slots, y, p.rows, SLOTS=partial.shape[1], B=batch, BLOCK=_BLOCK, **FOUR_WARPS
    )
    return y


def decode_experts(
    p: PackedProjection, out: Tensor, counts: Tensor, first: int, plan: LaunchPlan, ratio: bool
) -> None:
    """Fills out [slots, rows, P, depth] with the codes of experts first.. that have counts > 0;
    `ratio` see `decode.decode_active`.
    """
    slots, _, _, depth = out.shape
    size = out[0].numel()
    decode.zero_active[(triton.cdiv(size, 2048), slots)](
        out, counts, first, p.experts, size, BLOCK=2048, **FOUR_WARPS
    )
    negative = p.row_scale if p.row_scale_neg is None else p.row_scale_neg
    for limit in p.limits:
        decode.decode_active[(p.programs, slots)](
            *decoder_args(p), p.row_scale, negative, out, counts, first, p.experts, p.rows,
            p.columns.shape[2], depth, p.tiles,
            4 if p.wide else 2, 4, p.context_maps.shape[1],
            L=limit, S=p.segments, WIDE=p.wide, NEG=ratio and p.row_scale_neg is not None,
            ASM=plan.asm, **ONE_WARP,
        )  # fmt: skip


def project_grouped(
    p: PackedProjection, x: Tensor, index: Tensor, fan: int, plan: LaunchPlan
) -> Tensor:
    """`project` by decoding every active expert once, `plan.scratch_bytes` at a time."""
    pairs = index.numel()
    expert = torch.where((index >= 0) & (index < p.experts), index, p.experts).long()
    order = torch.argsort(expert, stable=True)
    counts = torch.zeros(p.experts + 1, dtype=torch.int32, device=x.device)
    counts.index_add_(0, expert, torch.ones_like(expert, dtype=torch.int32))
    offsets = torch.nn.functional.pad(counts[:-1].cumsum(0), (1, 0)).int()
    depth = -(-(p.columns.shape[2] - 2) // plan.depth_tile) * plan.depth_tile
    kind = inputs_type(x)
    xs = torch.empty(pairs, p.pieces, depth, dtype=kind, device=x.device)
    sorted_expert, order = expert[order].int(), order.int()
    matvec.gather_inputs[(triton.cdiv(depth, _BLOCK), p.pieces, pairs)](
        x, sorted_expert, order, p.columns, p.scales, xs, p.experts, p.cols, fan,
        p.columns.shape[2], depth,
        B=1, OFFSET=1, BLOCK=_BLOCK, **FOUR_WARPS,
    )  # fmt: skip
    size = p.rows * p.pieces * depth
    slots = max(1, min(p.experts, plan.scratch_bytes // (size * kind.itemsize)))
    codes = torch.empty(slots, p.rows, p.pieces, depth, dtype=kind, device=x.device)
    y = torch.zeros(pairs, p.rows, dtype=x.dtype, device=x.device)
    split = max(1, min(4, pairs // (p.experts * plan.token_tile)))
    for first in range(0, p.experts, slots):
        decode_experts(p, codes, counts, first, plan, ratio=True)
        grouped.grouped_dot[(triton.cdiv(p.rows, plan.row_tile), slots, split)](
            xs, codes, p.row_scale, offsets, order, y, first, p.experts, p.rows, p.pieces * depth,
            TOKENS=plan.token_tile, ROWS=plan.row_tile, DEPTH=plan.depth_tile, SPLIT=split,
            EXACT=INTERPRETED or kind == torch.float32, num_warps=plan.dot_warps,
            num_stages=plan.dot_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def weights(p: PackedProjection, expert: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dense weights of one expert by the kernel, [rows, cols]: float32 equals `weights_torch` bit
    for bit.
    """
    depth = p.columns.shape[2] - 1
    codes = torch.empty(1, p.rows, p.pieces, depth, dtype=torch.float32, device=p.words.device)
    counts = torch.ones(p.experts, dtype=torch.int32, device=p.words.device)
    decode_experts(p, codes, counts, expert, plan_of(p.words.device), ratio=False)
    return _dense(p, expert, torch.nn.functional.pad(codes[0], (1, 0))).to(dtype)
