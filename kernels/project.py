"""y = W[expert] x for every (token, expert) pair of a layer: launchers of the kernels. The torch
twins that define them are in `qmoe.kernels.twins`.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from qmoe.kernels import decode, decode_shared, grouped, inputs, matvec, pair_groups, shared, sums
from qmoe.kernels.launch import LaunchPlan, batch_of, is_forced, plan_of
from qmoe.kernels.pack import PackedProjection
from qmoe.kernels.twins import dense_of

INTERPRETED = not isinstance(
    matvec.matvec, triton.JITFunction
)  # TRITON_INTERPRET=1: kernels run on CPU tensors
BLOCK = 256
# the instruction counts rest on fused multiply-add; Triton's default is about to change
ONE_WARP = {"num_warps": 1, "enable_fp_fusion": True}
FOUR_WARPS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}


def runs_kernels(device: torch.device) -> bool:
    """Whether products on a device are done by kernels; otherwise by their twins."""
    return device.type != "cpu" or INTERPRETED or is_forced()


def guard(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device and stream: makes `device` the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


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
        p.row_classes,
        p.cuts,
        p.starts,
        p.classes,
        p.context_maps,
        p.expert_info,
        p.lut,
    )


@dataclass(frozen=True)
class Groups:
    """Who shares a decoded expert, see `pair_groups.group_pairs_torch`.

    With one pair a group nothing is grouped: `expert` and `slots` are the index of experts itself
    and there are no members.
    """

    expert: Tensor
    members: Tensor | None
    slots: Tensor
    batch: int

    @property
    def direct(self) -> bool:
        """Whether a group is its pair."""
        return self.members is None


def make_groups(index: Tensor, experts: int, batch: int) -> Groups:
    """Groups of up to `batch` pairs of one expert: nothing for one, a kernel for few pairs."""
    if batch == 1:
        return Groups(index, None, index, 1)
    pairs = index.numel()
    if pairs > pair_groups.MAX_PAIRS:
        return Groups(*pair_groups.group_pairs_torch(index, experts, batch), batch)
    count = pair_groups.group_count(pairs, experts, batch)
    expert = torch.empty(count, dtype=torch.int32, device=index.device)
    members = torch.empty(count, batch, dtype=torch.int32, device=index.device)
    slots = torch.empty(pairs, dtype=torch.int32, device=index.device)
    block = next(b for b in pair_groups.BLOCKS if b >= pairs)
    pair_groups.group_small[(1,)](
        index, expert, members, slots, pairs, count, experts, B=batch, BLOCK=block, **FOUR_WARPS
    )
    return Groups(expert, members, slots, batch)


def gathered(
    p: PackedProjection,
    x: Tensor,
    groups: Groups,
    fan: int,
    plan: LaunchPlan,
    dependent: bool = False,
) -> Tensor:
    """Scaled inputs of every group: [groups, P, width, B], see `inputs.gather_inputs`."""
    count, batch = groups.expert.numel(), groups.batch
    xs = torch.empty(count, p.pieces, p.width, batch, dtype=inputs_type(x), device=x.device)
    inputs.gather_inputs[(count, p.pieces, -(-p.width // BLOCK))](
        x, groups.expert, groups.slots if groups.members is None else groups.members,
        p.columns, p.scales, xs, p.experts, p.cols, fan, p.stored, p.width,
        B=batch, OFFSET=0, BLOCK=BLOCK, MEMBERS=not groups.direct, PDL=plan.pdl,
        **launched(plan, dependent),
    )  # fmt: skip
    return xs


def launched(plan: LaunchPlan, dependent: bool) -> dict[str, Any]:
    """Launch options of four warps; `dependent`: it may begin before the launch in front of it has
    ended, which is one of ours.
    """
    return FOUR_WARPS | {"launch_pdl": True} if plan.pdl and dependent else FOUR_WARPS


def builds_inputs(p: PackedProjection, plan: LaunchPlan, batch: int) -> bool:
    """Whether `first_sums` needs no launch for its inputs."""
    return (
        plan.shared
        and all(shared.fits(limit, p.wide) for limit in p.limits)
        and shared.room(p.width, batch) > 0
    )


def first_sums(
    p: PackedProjection,
    x: Tensor,
    groups: Groups,
    fan: int,
    plan: LaunchPlan,
    dependent: bool = False,
) -> Tensor:
    """Partial sums of W[expert] x from the rows of a layer's input, as `partial_sums`."""
    if builds_inputs(p, plan, groups.batch):
        return _launch_matvec(p, x, groups, plan, dependent, fan)
    xs = gathered(p, x, groups, fan, plan, dependent)
    return partial_sums(p, xs, groups, plan, dependent=True)


def partial_sums(
    p: PackedProjection, xs: Tensor, groups: Groups, plan: LaunchPlan, dependent: bool = False
) -> Tensor:
    """float32 [groups, P * S, B, rows]: every segment's share of W[expert] xs, for scaled inputs.

    `dependent`: the launch in front of this one is one of ours.
    """
    return _launch_matvec(p, xs, groups, plan, dependent, 0)


def _launch_matvec(
    p: PackedProjection, xs: Tensor, groups: Groups, plan: LaunchPlan, dependent: bool, fan: int
) -> Tensor:
    """fan > 0: xs is the layer's input, and the kernel builds its inputs."""
    count, batch, bits = groups.expert.numel(), groups.batch, 8 * inputs_type(xs).itemsize
    slots = p.pieces * p.segments
    partial = torch.empty(count, slots, batch, p.rows, dtype=torch.float32, device=xs.device)
    negative = p.row_scale if p.row_scale_neg is None else p.row_scale_neg
    grid = count, slots, -(-p.tiles // plan.warps)
    for k, limit in enumerate(p.limits):
        kernel: Any = matvec.matvec
        extra: tuple[Tensor | int, ...] = ()
        more: tuple[int, ...] = ()
        options: dict[str, Any] = {"num_warps": plan.warps, "enable_fp_fusion": True}
        if plan.shared and shared.fits(limit, p.wide):
            kernel, extra, more = shared.matvec_shared, (p.columns, p.scales), (p.cols,)
            options |= {
                "ROOM": shared.room(p.width, batch), "FILL": shared.fill(p.width, plan.warps),
                "FAN": fan,
            }  # fmt: skip
        if plan.pdl and dependent and k == 0:  # a second launch waits for the first to its end
            options["launch_pdl"] = True
        kernel[grid](
            *decoder_args(p), p.row_scale, negative, xs, groups.expert, partial, *extra,
            p.experts, p.rows, p.stored, p.width, p.tiles, 4 if p.wide else 2,
            min(8, batch * bits // 8), 4, *more,
            B=batch, X_BITS=bits, L=limit, S=p.segments, W=plan.warps, WIDE=p.wide,
            NEG=p.row_scale_neg is not None, ASM=plan.asm, PDL=plan.pdl, **options,
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
        index: integer [pairs], contiguous; outside 0..E-1 gives zeros.
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
    groups = make_groups(index, p.experts, batch)
    partial = first_sums(p, x, groups, fan, plan, dependent=not groups.direct)
    y = torch.empty(pairs, p.rows, dtype=x.dtype, device=x.device)
    sums.sum_partials[(pairs, -(-p.rows // BLOCK))](
        partial, groups.slots, y, p.experts, p.rows,
        SLOTS=partial.shape[1], B=batch, BLOCK=BLOCK, DIRECT=groups.direct, **FOUR_WARPS,
    )  # fmt: skip
    return y


def codes_type(p: PackedProjection, x: torch.dtype) -> torch.dtype:
    """Type of decoded codes that are multiplied with scaled inputs of type x: bytes, unless
    negative codes have scales of their own.
    """
    return torch.int8 if p.row_scale_neg is None else x


def decode_experts(
    p: PackedProjection, out: Tensor, counts: Tensor, first: int, plan: LaunchPlan, ratio: bool
) -> None:
    """Fills out [slots, rows, P, depth] with the codes of experts first.. that have counts > 0;
    `ratio` see `decode.decode_active`.
    """
    slots, _, _, depth = out.shape
    by_tile = (
        plan.shared
        and out.dtype == torch.int8
        and decode_shared.fits(depth)
        and all(shared.fits(limit, p.wide) for limit in p.limits)
    )
    if by_tile:
        for limit in p.limits:
            decode_shared.decode_shared[(p.pieces * p.tiles, slots)](
                *decoder_args(p), out, counts, first, p.experts, p.rows, p.stored, depth, p.tiles,
                2, 4, L=limit, ASM=plan.asm, ROOM=decode_shared.room(depth),
                STEP=decode_shared.CHUNK, **ONE_WARP,
            )  # fmt: skip
        return
    size = out[0].numel()
    decode.zero_active[(-(-size // 2048), slots)](
        out, counts, first, p.experts, size, BLOCK=2048, **FOUR_WARPS
    )
    negative = p.row_scale if p.row_scale_neg is None else p.row_scale_neg
    for limit in p.limits:
        decode.decode_active[(p.programs, slots)](
            *decoder_args(p), p.row_scale, negative, out, counts, first, p.experts, p.rows,
            p.stored, depth, p.tiles, p.over, 4 if p.wide else 2, 4,
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
    depth = -(-(p.stored - 1) // plan.depth_tile) * plan.depth_tile
    kind = inputs_type(x)
    xs = torch.empty(pairs, p.pieces, depth, dtype=kind, device=x.device)
    sorted_expert, order = expert[order].int(), order.int()
    inputs.gather_inputs[(pairs, p.pieces, -(-depth // BLOCK))](
        x, sorted_expert, order, p.columns, p.scales, xs, p.experts, p.cols, fan, p.stored, depth,
        B=1, OFFSET=1, BLOCK=BLOCK, MEMBERS=True, PDL=False, **FOUR_WARPS,
    )  # fmt: skip
    size, stored_as = p.rows * p.pieces * depth, codes_type(p, kind)
    slots = max(1, min(p.experts, plan.scratch_bytes // (size * stored_as.itemsize)))
    codes = torch.empty(slots, p.rows, p.pieces, depth, dtype=stored_as, device=x.device)
    y = torch.zeros(pairs, p.rows, dtype=x.dtype, device=x.device)
    split = max(1, min(4, pairs // (p.experts * plan.token_tile)))
    stages = plan.dot_stages if kind.itemsize == 2 else plan.float_stages
    for first in range(0, p.experts, slots):
        decode_experts(p, codes, counts, first, plan, ratio=True)
        grouped.grouped_dot[(-(-p.rows // plan.row_tile), slots, split)](
            xs, codes, p.row_scale, offsets, order, y, first, p.experts, p.rows, p.pieces * depth,
            TOKENS=plan.token_tile, ROWS=plan.row_tile, DEPTH=plan.depth_tile,
            EXACT=INTERPRETED or kind == torch.float32, num_warps=plan.dot_warps,
            num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def weights(
    p: PackedProjection,
    expert: int,
    dtype: torch.dtype = torch.float32,
    plan: LaunchPlan | None = None,
) -> Tensor:
    """Dense weights of one expert by the kernel, [rows, cols]: float32 equals `weights_torch` bit
    for bit.
    """
    depth = p.stored - 1
    kind = codes_type(p, torch.float32)
    codes = torch.empty(1, p.rows, p.pieces, depth, dtype=kind, device=p.words.device)
    counts = torch.ones(p.experts, dtype=torch.int32, device=p.words.device)
    plan = plan or plan_of(p.words.device)
    decode_experts(p, codes, counts, expert, plan, ratio=False)
    return dense_of(p, expert, torch.nn.functional.pad(codes[0].float(), (1, 0))).to(dtype)
