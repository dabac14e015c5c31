"""How much the loss feels an error of each layer's experts: weights for the allocation of bits.

The importance of a layer is the mean over tokens of the squared gradient of the loss at its
experts' output, the labels drawn from the model itself (the trace of the Fisher information with
respect to that output); see docs/log-quant.md for what it is worth. The gradient needs the whole
model at once, so it is taken only where the model fits in the memory that the run was given.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qmoe.models.auto import building
from qmoe.models.downloads import begin_walk, leave
from qmoe.models.families.find import repair
from qmoe.models.streamed import StreamedModel

TOKENS = 16384  # calibration tokens behind the gradients
_STEPS = 16  # per octave, of the importance that is handed on: see layer_importance
_ROOM = 2.5  # float32 weights, and activations of a batch with its gradients, per byte of weights


def fits(streamed: StreamedModel, memory: int) -> bool:
    """Whether the model in float32, with a batch's activations, stays within `memory` bytes."""
    weights: int = sum(p.numel() for p in streamed.model.parameters())
    return _ROOM * 4 * weights <= memory


def layer_importance(
    streamed: StreamedModel, batches: Sequence[dict[str, Tensor]]
) -> dict[str, float]:
    """Importance of every experts module, with a geometric mean of 1 up to its rounding.

    It is rounded to sixteenths of an octave (a step of 4.4 %, far below what it is known to): the
    order in which sums are made, and with it the number of threads, changes the gradients by up to
    1e-5, and that is not to reach the bytes of a checkpoint.

    Args:
        streamed: the source, everything outside its blocks loaded; all blocks are for the time of
            the call.
        batches: calibration inputs; about TOKENS tokens of them are used.

    Returns:
        {module path: importance}.
    """
    modules = {layout.path: module for layout, module in streamed.experts}
    with whole_model(streamed):
        squares = squared_gradients(streamed, batches, modules)
    means = torch.tensor([squares[path] for path in modules], dtype=torch.float64)
    means = means / means.clamp_min(1e-30).log().mean().exp()
    return dict(zip(modules, _rounded(means.clamp(1e-3, 1e3)).tolist(), strict=True))


@contextmanager
def whole_model(streamed: StreamedModel) -> Iterator[None]:
    """While the context is open, all blocks are loaded and no parameter wants a gradient."""
    blocks = list(streamed.blocks())
    begin_walk(streamed, blocks)
    for block in blocks:
        streamed.load_block(block)
        leave(streamed, block)
    repaired = repair(streamed.model)
    for p in streamed.model.parameters():
        p.requires_grad_(False)
    yield
    for path in repaired:
        del streamed.model.get_submodule(path).forward
    for block in blocks:
        streamed.free(block)


def squared_gradients(
    streamed: StreamedModel, batches: Sequence[dict[str, Tensor]], modules: Mapping[str, nn.Module]
) -> dict[str, float]:
    """Mean over predicted tokens of the squared gradient of the loss at modules' outputs, the
    labels drawn from the model itself.

    Args:
        streamed: with all of it loaded, see `whole_model`.
        batches: calibration inputs; about TOKENS tokens of them are used.
        modules: by any name; a module's output is one tensor.

    Returns:
        Sums over the outputs' width, by name; 0 where a module was never called.
    """
    squares = dict.fromkeys(modules, 0.0)
    generator = torch.Generator().manual_seed(0)
    count = max(1, TOKENS // max(1, batches[0]["input_ids"].numel()))
    tokens = 0
    for i in range(min(count, len(batches))):
        batch = batches[i * len(batches) // min(count, len(batches))]
        # a few rows at a time: the graph of a whole batch would be the larger part of the memory
        for rows in range(len(batch["input_ids"])):
            one = {k: v[rows : rows + 1].to(streamed.device) for k, v in batch.items()}
            with building(str(streamed.checkpoint.directory), what="run"):
                tokens += _add(streamed, one, generator, modules, squares)
    return {name: total / tokens for name, total in squares.items()}


def _rounded(importance: Tensor) -> Tensor:
    """The nearest whole number of steps of an octave."""
    return torch.exp2((importance.log2() * _STEPS).round() / _STEPS)


@torch.enable_grad()
def _add(
    streamed: StreamedModel,
    batch: dict[str, Tensor],
    generator: torch.Generator,
    modules: Mapping[str, nn.Module],
    squares: dict[str, float],
) -> int:
    """Adds one sample's squared gradients; returns its number of predictions."""
    probes: dict[str, list[Tensor]] = {name: [] for name in modules}
    handles = []
    for name, module in modules.items():

        def hook(_: Any, __: Any, out: Tensor, name: str = name) -> Tensor:
            probes[name].append(torch.zeros_like(out, requires_grad=True))
            return out + probes[name][-1]

        handles.append(module.register_forward_hook(hook))
    try:
        logits = streamed.model(**batch, use_cache=False).logits.flatten(0, 1).float()
    finally:
        for handle in handles:
            handle.remove()
    drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
    F.cross_entropy(logits, drawn.to(logits.device), reduction="sum").backward()
    for name, called in probes.items():
        for probe in called:
            if probe.grad is not None:
                squares[name] += float(probe.grad.double().square().sum())
    return len(drawn)
