"""A walk through the source that learns each layer's bits as a function of the global step.

What is done with them is in `qmoe.compression.rate`. Of several processes each walks by itself
and solves its share of the samples; they exchange numbers only.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm

from qmoe.calib.activations import ActivationStore
from qmoe.calib.outputs import Outputs, Resident
from qmoe.compression.blocks import BlockLoop
from qmoe.compression.rate import MAX_WALKS, Controller, Curve, Probe, share_of
from qmoe.models.downloads import begin_walk, leave
from qmoe.models.streamed import BlockRef, StreamedModel
from qmoe.quantize import Method
from qmoe.system.processes import World

Batches = Sequence[dict[str, Tensor]]


def probed(
    streamed: StreamedModel,
    blocks: Sequence[BlockRef],
    batches: Batches,
    target: float,
    solver_options: Mapping[str, float],
    store: ActivationStore,
    make_run: Callable[[Method, Batches, Sequence[Outputs], World], BlockLoop],
    world: World,
    progress: bool,
) -> list[list[Any]]:
    """Curves of all modules that enclose the target.

    Args:
        streamed: the source, with everything outside its blocks resident.
        blocks: all of them, in order.
        batches: calibration inputs of the run; the probe sees a share of them.
        target: stored bits per expert weight.
        solver_options: of rd, beside the step.
        store: room for activations.
        make_run: from a method, batches, outputs and the processes that divide experts.
        world: the processes; all call this with the same arguments.
        progress: draw bars.

    Returns:
        `Curve.as_list` of every module, in order; the same bytes for every number of processes.
    """
    tokens = sum(b["input_ids"].numel() for b in batches)
    some = share_of(batches, batches[0]["input_ids"].numel())
    seen = sum(b["input_ids"].numel() for b in some)
    layouts = [la for b in blocks for la, _ in streamed.experts_of(b)]
    curves: list[Curve] = []
    delta: float | None = None
    for _ in range(MAX_WALKS):
        probe = Probe(target, tokens / seen, layouts, solver_options, delta, world)
        outputs = Resident(store)
        run = make_run(probe.method, some, [outputs], World())
        begin_walk(streamed, blocks, world)
        for i, block in enumerate(tqdm(blocks, desc="probe", unit="block", disable=not progress)):
            run.block(block, None, blocks[i + 1 : i + 2], probe.finish)
            world.meet(f"probe of {block.name}")
            leave(streamed, block)
        outputs.drop()
        pairs = zip(curves or probe.curves, probe.curves, strict=True)
        curves = [known.merged(found) for known, found in pairs]
        delta = Controller(target, curves).delta()
        if curves[0].deltas[0] <= delta <= curves[0].deltas[-1]:
            break  # between measured points: nothing was guessed
    return [c.as_list() for c in curves]
