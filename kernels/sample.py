"""Matrices with the class mix of a real quantized expert, for measurements that need realistic
streams but no model.

Gaussian weights on steps that spread over columns and rows as the rate-distortion quantizer spreads
them: at 0.8 bits the stand-in matches experts of the example model in zeros (0.80), symbols per
weight and tables (docs/log-kernels.md).
"""

import torch

from qmoe.types import QuantizedMatrix

SPREAD_COLS, SPREAD_ROWS = 1.0, 0.25  # standard deviations of the log energy
SIZE_AT_BITS = {0.5: 0.165, 0.8: 0.275, 1.2: 0.42, 2.0: 0.8}  # rms of a weight in steps


def sample_matrix(rows: int, cols: int, bits: float = 0.8, seed: int = 0) -> QuantizedMatrix:
    """A random quantized matrix of about `bits` (a key of SIZE_AT_BITS) per weight."""
    g = torch.Generator().manual_seed(seed)
    row = torch.randn(rows, 1, generator=g).mul(SPREAD_ROWS).exp()
    col = torch.randn(1, cols, generator=g).mul(SPREAD_COLS).exp()
    codes = torch.randn(rows, cols, generator=g).mul_(row).mul_(col).mul_(SIZE_AT_BITS[bits])
    row_scale = (torch.randn(rows, generator=g) * 5).round() * 4 - 300
    col_scale = (col[0].log2() * -4).round() * 16
    return QuantizedMatrix(
        codes.round_().clamp_(-127, 127).to(torch.int8), row_scale.short(), col_scale.short()
    )
