"""Which tensors a model keeps in a precision of their own, by the rule of transformers' loader."""

import re
from typing import Any

import torch


def kept_apart(model: Any, dtype: torch.dtype) -> set[str]:
    """Parameters and buffers that are not loaded in `dtype` where the rest is: routers' corrections
    that a family declares as to be kept in float32, and what its code makes so.

    Args:
        model: built for `dtype`, on any device.
        dtype: float16, bfloat16 or float32.
    """
    patterns = [p.replace("*", ".*") for p in model._get_dtype_plan(dtype)]
    declared = re.compile("|".join(f"(?:{p})" for p in patterns)) if patterns else None
    return {
        name
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
        and (tensor.dtype != dtype or (declared is not None and declared.search(name)))
    }
