"""How much the loss feels the coding of each dense matrix: what decides its share of the bits.

The loss answers noise in a matrix, to second order, with the Fisher information: squared gradients
at the output times the second moment H of the inputs (Kronecker-factored, as in K-FAC; labels drawn
from the model). Steps in proportion to U_jj, U^T U = H^-1, and error feedback leave the geometric
mean of 1 / U_jj^2 of it, times 4^-b at b bits. A matrix whose coding hurts four times as much
deserves one bit more.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qmoe.calib.importance import squared_gradients, whole_model
from qmoe.models.streamed import StreamedModel

_NEVER = -100.0  # score of a matrix that no token used
_DAMPING = 0.01  # of the mean diagonal, as in qmoe.quantize.dense
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
        See `_score`, rounded to eighths.
    """
    inputs: dict[str, Tensor] = {}
    counts = dict.fromkeys(modules, 0)
    handles = []
    for name, module in modules.items():
        if not isinstance(module, nn.Linear):
            continue

        def hook(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            x = args[0].detach().flatten(0, -2).double()
            inputs[name] = inputs.get(name, torch.zeros((), device=x.device)) + x.mT @ x
            counts[name] += len(x)

        handles.append(module.register_forward_pre_hook(hook))
    out = {}
    try:
        with whole_model(streamed):
            gradients = squared_gradients(streamed, batches, modules)
            for name, module in modules.items():
                weight = module.get_parameter("weight").detach().double()
                moment = inputs[name] / counts[name] if counts[name] else None
                table = not isinstance(module, nn.Linear)
                out[name] = _score(weight, gradients[name], moment, table)
    finally:
        for handle in handles:
            handle.remove()
    least = min((v for v in out.values() if v > _NEVER), default=0.0)
    return {n: round(max(v, least) * _STEPS) / _STEPS for n, v in out.items()}


def _score(weight: Tensor, gradient: float, moment: Tensor | None, table: bool) -> float:
    """log2 of the root of what coding at a common rate does to the loss, per weight.

    Args:
        weight: float64 [rows, cols].
        gradient: mean squared gradient at the output, summed over its width.
        moment: float64 [cols, cols], E[x x^T]; None where no input was seen.
        table: rows are looked up; one token in `rows` reads a row.
    """
    rows, cols = weight.shape
    if gradient <= 0:
        return _NEVER
    if table:
        return 0.5 * math.log2(float(weight.square().mean()) * gradient / cols / rows)
    if moment is None:
        return _NEVER
    damping = _DAMPING * moment.diagonal().mean()
    h = moment + damping * torch.eye(cols, dtype=moment.dtype, device=moment.device)
    # 1 / U_jj^2 are the variances of each input given those before it: their product is det H
    inverse = torch.linalg.cholesky(h).diagonal().log2().mean()
    size = weight.square().mean(0).clamp_min(1e-30).log2().mean() / 2
    return float(inverse + size) + 0.5 * math.log2(gradient / rows)
