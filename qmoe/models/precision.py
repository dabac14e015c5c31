"""The precision of a model: what its configuration says where that can be, and which tensors have
one of their own, by the rule of transformers' loader.
"""

import re
from typing import Any

import torch

_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def settle_dtype(config: Any, usual: torch.dtype) -> None:
    """Gives a configuration, and those of its parts, a dtype in which a model can be built where it
    has none: a quantizer may have written that of its words.

    Args:
        config: of a checkpoint.
        usual: dtype of most of its tensors.
    """
    parts = [getattr(config, name, None) for name in config.sub_configs]
    for part in (config, *filter(None, parts)):
        stated = getattr(part, "dtype", None)
        if stated not in _PLAIN and (stated is not None or part is config):
            part.dtype = usual


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
