"""Are all values of a tensor numbers?"""

import torch
from torch import Tensor

from qmoe.errors import NonFiniteError


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises NonFiniteError if a tensor holds NaN or Inf; the sum is non-finite exactly then (up to
    overflow, re-checked).
    """
    if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(
            f"{name}: {bad} of {tensor.numel()} values are NaN or Inf; the source is damaged"
        )
