"""Lets transformers' converters run on a single expert: stand-ins for the model and the experts
module while the weights of one expert are in memory.

Knows nothing about files.
"""

from typing import Any

import torch
from torch import Tensor


class PartOf:
    """A model whose parameters have as many rows as one expert: some converters compare what they
    get with the shape of the parameter, and transpose if it differs.
    """

    def __init__(self, model: Any, rows: int) -> None:
        self._model, self._rows = model, rows

    def get_parameter(self, name: str) -> Tensor:
        """The parameter's shape for one expert, without values."""
        whole = self._model.get_parameter(name)
        return torch.empty(self._rows, *whole.shape[1:], device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class StandIn:
    """Answers like an experts module that has only the parameters put into it; everything else is
    the real module's.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    def put(self, path: str, tensor: Tensor) -> None:
        """Sets a parameter by its dotted path."""
        head, _, rest = path.partition(".")
        if not rest:
            self.__dict__[head] = tensor
            return
        if head not in self.__dict__:
            self.__dict__[head] = StandIn(getattr(self._module, head))
        self.__dict__[head].put(rest, tensor)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __getitem__(self, key: str) -> Any:
        return self.__dict__.get(key) or self._module[key]
