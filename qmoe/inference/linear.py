"""Linears whose weights stay the 8-bit integers that a stream holds (``--dense-bits 4`` or 3): a
quarter of float32 in memory, and what a token reads.

Knows nothing about files. Products of few rows are ours and exact to the stored values; those of
many decode the matrix for the time of the call, as does everything that wants a gradient or runs on
another device.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qmoe import codec
from qmoe.codec.decoder.integers import STEP

FEW = 16  # rows of an input up to which the integers are multiplied as they lie


class IntegerLinear(nn.Linear):
    """A Linear that stands where the model's own stood.

    ``weight`` is int8 [rows, cols], the integers. Their scales are the buffers ``row_index`` int16
    [rows] and ``col_index`` int16 [bands, cols], which are not part of the state dict: the stream
    that a checkpoint stores is the only form in which the matrix is saved.
    """

    row_index: Tensor
    col_index: Tensor

    def __init__(self, host: nn.Linear, band: int) -> None:
        """Takes the place of a host that is on the meta device or empty.

        Args:
            host: its bias is taken over.
            band: rows of every band but the last.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = host.in_features, host.out_features
        rows, cols, self.band = host.out_features, host.in_features, band
        weight = torch.empty(rows, cols, dtype=torch.int8, device=host.weight.device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", host.bias)
        bands, none = -(-rows // band), torch.int16
        self.register_buffer("row_index", torch.zeros(rows, dtype=none), persistent=False)
        self.register_buffer("col_index", torch.zeros(bands, cols, dtype=none), persistent=False)

    def integers(self) -> codec.Integers:
        """The matrix where it is now."""
        return codec.Integers(self.weight.detach(), self.row_index, self.col_index, self.band)

    def forward(self, input: Tensor) -> Tensor:
        """``input @ weights.T + bias`` in the dtype of the input."""
        if torch.compiler.is_compiling():
            y: Tensor = _linear(input, self.weight, self.row_index, self.col_index, self.band)
        else:
            y = _apply(input, self.integers())
        return y if self.bias is None else y + self.bias


def fits(module: Any, rows: int, cols: int, planes: int) -> bool:
    """Whether a coded matrix can stay integers in the place of a module."""
    return (
        type(module) is nn.Linear
        and (module.out_features, module.in_features) == (rows, cols)
        and planes == 1
        and cols % STEP == 0
    )


def _apply(x: Tensor, integers: codec.Integers) -> Tensor:
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    learns = x.requires_grad and torch.is_grad_enabled()
    if rows > FEW or learns or x.device.type != "cpu":
        # a gradient needs the weights after the call
        return F.linear(x, integers.dense(x.dtype)) if learns else integers.dense_product(x)
    y = integers.product(x.detach().reshape(rows, x.shape[-1]).float())
    return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


@torch.library.custom_op("qmoe::integer_linear", mutates_args=())
def _linear(x: Tensor, codes: Tensor, row_index: Tensor, col_index: Tensor, band: int) -> Tensor:
    with torch.no_grad():
        return _apply(x, codec.Integers(codes, row_index, col_index, band)).contiguous()


@_linear.register_fake
def _(x: Tensor, codes: Tensor, row_index: Tensor, col_index: Tensor, band: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.custom_op("qmoe::integer_weights", mutates_args=())
def _weights(
    codes: Tensor, row_index: Tensor, col_index: Tensor, band: int, dtype: torch.dtype
) -> Tensor:
    return codec.Integers(codes, row_index, col_index, band).dense(dtype)


@_weights.register_fake
def _(codes: Tensor, row_index: Tensor, col_index: Tensor, band: int, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype)


def _keep(ctx: Any, inputs: Any, output: Tensor) -> None:
    _, *tensors, ctx.band = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> Any:
    codes, row_index, col_index = ctx.saved_tensors
    dense = _weights(codes, row_index, col_index, ctx.band, grad.dtype)
    return grad @ dense, None, None, None, None


_linear.register_autograd(_differentiate, setup_context=_keep)
