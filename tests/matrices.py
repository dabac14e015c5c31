"""Matrices for tests of codec and kernels."""

import torch

from qmoe.types import QuantizedMatrix


def rough_matrix(
    rows: int, cols: int, size: float = 0.4, negative: bool = False, seed: int = 0
) -> QuantizedMatrix:
    """Random codes of log-normal column energies around `size`; `negative` makes an asymmetric
    ternary grid.
    """
    g = torch.Generator().manual_seed(seed)
    codes = torch.randn(rows, cols, generator=g) * torch.randn(1, cols, generator=g).exp() * size
    codes = codes.round().clamp(-1 if negative else -127, 1 if negative else 127).to(torch.int8)
    scale = torch.randint(-320, -250, (2, rows), generator=g).short()
    col = (torch.randint(-6, 6, (cols,), generator=g) * 16).short()
    return QuantizedMatrix(codes, scale[0], col, scale[1] if negative else None)
