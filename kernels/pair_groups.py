# ruff: noqa: ANN001, ANN201 -- arguments of device code have no Python types
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
"""Who shares a decoded expert: pairs (token, expert) -> groups of up to B pairs of one expert, on
the device, without synchronization.

Shapes are functions of the number of pairs T, of E and B only: at most min(T, (T + E (B - 1)) / B)
groups. Which group a pair lands in does not change its result. `group_pairs_torch` is the
definition; the kernel does the same for up to MAX_PAIRS pairs in one launch instead of a dozen.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_PAIRS = 1024
BLOCKS = (64, 256, MAX_PAIRS)  # a kernel is compiled for each, not for each number of pairs


def group_count(pairs: int, experts: int, batch: int) -> int:
    """Most groups that `pairs` pairs can need."""
    return max(1, min(pairs, (pairs + experts * (batch - 1)) // batch))


def group_pairs_torch(index: Tensor, experts: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups pairs by expert, in expert order, then in pair order.

    Args:
        index: integer [pairs], expert of each pair; outside 0..experts-1: no expert.
        experts: E.
        batch: B, pairs per group.

    Returns:
        group_expert int32 [groups], -1 = empty; group_pairs int32 [groups, B], -1 = empty; slots
        int32 [pairs], group * B + place or -1.
    """
    t, device = index.numel(), index.device
    index = torch.where((index >= 0) & (index < experts), index, experts).long()
    order = torch.argsort(index, stable=True)
    expert = index[order]
    counts = torch.zeros(experts + 1, dtype=torch.long, device=device).index_add_(
        0, index, torch.ones_like(index)
    )
    rank = torch.arange(t, device=device) - (counts.cumsum(0) - counts)[expert]
    started = (counts + batch - 1) // batch
    slot = ((started.cumsum(0) - started)[expert] + rank // batch) * batch + rank % batch
    groups = group_count(t, experts, batch)
    slot = torch.where(
        expert < experts, slot, groups * batch
    )  # one place behind the end takes what is dropped
    group_expert = torch.full((groups + 1,), -1, dtype=torch.int32, device=device)
    group_expert[slot // batch] = torch.where(expert < experts, expert, -1).int()
    pairs = torch.full((groups * batch + 1,), -1, dtype=torch.int32, device=device)
    pairs[slot] = order.int()
    slots = torch.empty(t, dtype=torch.int32, device=device)
    slots[order] = torch.where(expert < experts, slot, -1).int()
    return group_expert[:-1], pairs[:-1].view(groups, batch), slots


@triton.jit
def expert_at(index, i, pairs, experts):
    """Experts of pairs i as int32, -1 where there is none."""
    e = tl.load(index + i, mask=i < pairs, other=-1)
    return tl.where((e >= 0) & (e < experts), e, -1).to(tl.int32)


@triton.jit(do_not_specialize=["pairs", "groups"])
def group_small(
    index,
    group_expert,
    group_pairs,
    slots,
    pairs,
    groups,
    experts,
    B: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`group_pairs_torch` by one program that compares all pairs with all; BLOCK >= pairs, of
    BLOCKS.
    """
    i = tl.arange(0, BLOCK)
    for g in range(0, groups, BLOCK):
        tl.store(group_expert + g + i, tl.full([BLOCK], -1, tl.int32), mask=g + i < groups)
    for g in range(0, groups * B, BLOCK):
        tl.store(group_pairs + g + i, tl.full([BLOCK], -1, tl.int32), mask=g + i < groups * B)
    e = expert_at(index, i, pairs, experts)
    valid = e >= 0
    rank = tl.zeros([BLOCK], tl.int32)
    j = tl.arange(0, 16)
    for first in range(0, pairs, 16):
        other = expert_at(index, first + j, pairs, experts)
        same = (e[:, None] == other[None, :]) & ((first + j)[None, :] < i[:, None])
        rank += tl.sum(same.to(tl.int32), axis=1)
    tl.store(slots + i, rank, mask=i < pairs)
    tl.debug_barrier()
    before = tl.zeros([BLOCK], tl.int32)  # groups of experts in front of this one
    for first in range(0, pairs, 16):
        inside = first + j < pairs
        other = expert_at(index, first + j, pairs, experts)
        leads = inside & (other >= 0) & (tl.load(slots + first + j, mask=inside, other=1) % B == 0)
        before += tl.sum(((other[None, :] < e[:, None]) & leads[None, :]).to(tl.int32), axis=1)
    tl.debug_barrier()
    group = before + rank // B
    tl.store(group_expert + group, e, mask=valid & (rank % B == 0))
    tl.store(group_pairs + group * B + rank % B, i, mask=valid)
    tl.store(slots + i, tl.where(valid, group * B + rank % B, -1), mask=i < pairs)
