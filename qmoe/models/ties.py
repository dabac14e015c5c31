"""Tied parameters as a checkpoint stores them, by the rule of transformers' own loader.

A configuration may tie parameters that the files hold with different values (a head that was
trained apart, embeddings of an encoder that were), or the files may hold only the copy. What is
stored decides: different values stay apart, and whatever is there stands for what is not.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qmoe.source.checkpoint import Checkpoint

_CHUNK = 1 << 24  # values that are compared at once
# parameter -> {name on disk: pattern of the converter that reads it, or None}
Sources = Mapping[str, Mapping[str, str | None]]


def tied_names(model: nn.Module) -> list[tuple[Any, Any]]:
    """(copy, original) of every tied parameter."""
    return list((getattr(model, "all_tied_weights_keys", None) or {}).items())


def settle_ties(model: nn.Module, checkpoint: Checkpoint, sources: Sources) -> set[str]:
    """Unties what the checkpoint stores with different values; reads such pairs once, in parts.

    Args:
        model: on the meta device; its ties are as its configuration has them.
        checkpoint: the open source.
        sources: parameter -> its tensors in the checkpoint, see `qmoe.models.streamed.Host`.

    Returns:
        Names of tied parameters that the checkpoint does not store, for `tie_weights`.
    """
    for copy, original in tied_names(model):
        stored = copy in sources and original in sources
        if stored and not _equal(checkpoint, sources, copy, original):
            del model.all_tied_weights_keys[copy]  # type: ignore[union-attr,operator]
            path, _, leaf = copy.rpartition(".")
            own = torch.empty_like(model.get_parameter(copy), device="meta")
            setattr(model.get_submodule(path), leaf, nn.Parameter(own, requires_grad=False))
    return {n for pair in tied_names(model) for n in pair if n not in sources}


def stand_ins(model: nn.Module, sources: Sources) -> dict[str, str]:
    """{original that is not stored: a stored copy of it}."""
    found: dict[str, str] = {}
    for copy, original in tied_names(model):
        if original not in sources and copy in sources:
            found.setdefault(original, copy)
    return found


def _equal(checkpoint: Checkpoint, sources: Sources, first: str, second: str) -> bool:
    names = [list(sources[n]) for n in (first, second)]
    if any(len(disks) != 1 for disks in names):
        return False  # assembled from several tensors; each is loaded for itself
    a, b = names[0][0], names[1][0]
    shape = checkpoint.shape(a)
    if a == b:
        return True
    if checkpoint.shape(b) != shape:
        return False
    rows = max(1, _CHUNK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0] if shape else 1, rows):
        at = slice(start, start + rows) if shape else ...
        x, y = checkpoint.read(a, at), checkpoint.read(b, at)
        if not torch.equal(x.float(), y.float()):
            return False
    return True
