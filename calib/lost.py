"""What the residual stream has lost in front of a block: the original's minus the quantized one's.

The experts' output is added to that stream, so their last projection can make a part of it good. It
is asked of them only where that is so: a block that puts a norm behind its experts, or another
function of what they answer, is left alone; see `added`.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.calib.activations import ActivationStore
from qmoe.calib.outputs import tree
from qmoe.calib.routing import Parked, answering, spread_rows
from qmoe.calib.walk import Walk
from qmoe.models.streamed import BlockRef
from qmoe.system.processes import World

_LINEAR = 0.02  # what an answer may differ from its multiple in the block's output


def lost(
    walks: Sequence[Walk],
    block: BlockRef,
    parked: Parked,
    factor: float,
    store: ActivationStore,
    world: World,
) -> Tensor | None:
    """Rows [N, width] of what the answers are to make good, in the order of `parked`; None where
    the stream is no rows of the answers' width.

    Args:
        walks: of the quantized model and of the original.
        block: whose experts are parked.
        parked: of the quantized model.
        factor: see `added`.
        store, world: as for `qmoe.calib.routing.park`.
    """
    width = parked.output.shape[-1]
    starts = [0, *accumulate(parked.rows)]
    found: dict[int, Tensor] = {}
    for n in walks[0].mine:
        quantized, original = (_first(walk.before(block.list_name, n)) for walk in walks)
        if quantized.shape[-1] == width and quantized.numel() == parked.rows[n] * width:
            found[n] = store.keep((original - quantized).view(-1, width) / factor)
    owner = {n: r for r, ns in enumerate(world.collect([*found], "streams")) for n in ns}
    out = None
    if len(owner) == len(parked.rows):
        out = store.shared(world, (starts[-1], width), parked.hidden.dtype)
        for n, rows in found.items():
            out[starts[n] : starts[n + 1]] = rows
        if world.apart:
            spread_rows(world, [out], starts, owner)
    for rows in found.values():
        store.release(rows)
    world.meet("streams")
    return out


def share(parked: Parked, experts: int, expert: int, token: Tensor) -> Tensor:
    """Shares [n] of an expert in what tokens have lost: by their routing weights, divided by its
    own; 0 for tokens that it does not see."""
    used = parked.index[token] < experts
    total = (parked.weight[token] * used).sum(1)
    sees = (parked.index[token] == expert).any(1) & (total > 0)
    return sees / total.clamp(min=1e-6)


@torch.no_grad()
def added(walk: Walk, block: BlockRef, module: nn.Module, parked: Parked) -> float:
    """By what a block multiplies its experts' answer before it adds it; 0 where it does not add it,
    where rows are no tokens in order, and in front of the first block, where nothing is lost.

    Two answers are tried on the first batch: nothing, and noise whose rows differ in size, which a
    norm would not hand on as it is.
    """
    if parked.token is not None or block.list_name not in walk.finished:
        return 0.0
    count, width = parked.rows[0], parked.output.shape[-1]
    generator = torch.Generator().manual_seed(0)
    sizes = 1.0 + torch.arange(count) % 4
    noise = torch.randn(count, width, generator=generator) * sizes[:, None]
    without, answer = (_answered(walk, block, module, n) for n in (torch.zeros_like(noise), noise))
    if without is None or answer is None or without.numel() != noise.numel():
        return 0.0
    change = (answer - without).view_as(noise)
    factor = round(float((change * noise).sum() / noise.square().sum()), 2)
    apart = (change - factor * noise).norm() / noise.norm()
    return factor if abs(factor) > _LINEAR and apart < _LINEAR * abs(factor) else 0.0


def _answered(walk: Walk, block: BlockRef, module: nn.Module, answer: Tensor) -> Tensor | None:
    """What the block returns for the first batch when its experts answer so."""
    with answering(module, answer):
        found = walk.returned(block, 0)
    return None if found is None else _first(found).float().cpu()


def _first(value: Any) -> Tensor:
    """The first tensor of what a block returned: the stream."""
    seen: list[Tensor] = []
    tree(lambda t: seen.append(t), value)
    return seen[0].cpu()
