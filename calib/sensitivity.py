"""How much the loss feels the coding of each dense matrix: what decides its share of the bits.

Coding at b bits leaves noise of variance 4^-b in proportion to the weights', and the loss answers,
to second order, with the Fisher information of that weight: the mean of squared inputs times
squared gradients of the loss at the output (its diagonal, as in optimal brain damage; labels drawn
from the model). A matrix whose weights weigh four times as much deserves one bit more.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qmoe.calib.importance import squared_gradients, whole_model
from qmoe.models.streamed import StreamedModel

_STEPS = 8  # of a bit: the order of sums is not to reach the bytes of a checkpoint


def dense_sensitivity(
    streamed: StreamedModel,
    batches: Sequence[dict[str, Tensor]],
    modules: Mapping[str, nn.Module],
) -> dict[str, float]:
    """Bits that each matrix should have beyond a common number.

    Args:
        streamed: the source, everything outside its blocks loaded; all blocks are for the time of
            the call.
        batches: calibration inputs.
        modules: of the matrices, by the name of the weight; what is no Linear is a table.

    Returns:
        log2 of the mean Fisher-weighted squared weight, halved and rounded to eighths.
    """
    inputs: dict[str, Tensor] = {}
    counts = dict.fromkeys(modules, 0)
    handles = []
    for name, module in modules.items():
        if not isinstance(module, nn.Linear):
            continue

        def hook(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            x = args[0].detach().flatten(0, -2).double()
            inputs[name] = inputs.get(name, torch.zeros(())) + x.square().sum(0).cpu()
            counts[name] += len(x)

        handles.append(module.register_forward_pre_hook(hook))
    out = {}
    try:
        with whole_model(streamed):
            gradients = squared_gradients(streamed, batches, modules)
            for name, module in modules.items():
                weight = module.get_parameter("weight").detach().double().cpu()
                (rows, cols), squares = weight.shape, weight.square()
                if not isinstance(module, nn.Linear):  # a row is read by one token in `rows`
                    felt = float(squares.mean()) * gradients[name] / cols / rows
                elif counts[name]:
                    seen = inputs[name] / counts[name]
                    felt = float((squares * seen).mean()) * gradients[name] / rows
                else:
                    felt = 0.0
                out[name] = 0.5 * math.log2(max(felt, 1e-60))
    finally:
        for handle in handles:
            handle.remove()
    least = min((v for v in out.values() if v > -50), default=0.0)
    return {n: round(max(v, least) * _STEPS) / _STEPS for n, v in out.items()}
