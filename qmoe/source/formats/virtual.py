"""Dense tensors that exist only while they are read: what a low-precision source format means in
bf16.
"""

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from qmoe.source.selection import Selection, cut, leading


class Raw(Protocol):
    """The tensors as they are in the files."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str, selection: Selection = ...) -> Tensor: ...


class Virtual(ABC):
    """A dense bf16 tensor computed from `parts`, the stored tensors that it hides."""

    parts: tuple[str, ...]
    dtype = torch.bfloat16

    @abstractmethod
    def shape(self, raw: Raw) -> tuple[int, ...]:
        """Shape of the dense tensor.

        Raises:
            SourceError: the parts' shapes or dtypes do not fit each other.
        """

    @abstractmethod
    def rows(self, raw: Raw, start: int, stop: int) -> Tensor:
        """``dense[start:stop]`` of the leading dimension, bf16, reading no more of the parts than
        that needs.
        """

    def read(self, raw: Raw, selection: Selection = ...) -> Tensor:
        """``dense[selection]``, bf16."""
        start, stop, rest = leading(selection, self.shape(raw))
        return cut(self.rows(raw, start, stop), rest)
