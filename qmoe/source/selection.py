"""What part of a tensor to read: the leading dimension decides which bytes, the rest is cut in
memory.
"""

from types import EllipsisType
from typing import TypeAlias

from torch import Tensor

Index: TypeAlias = int | slice | EllipsisType
Selection: TypeAlias = Index | tuple[Index, ...]


def leading(selection: Selection, shape: tuple[int, ...]) -> tuple[int, int, tuple[Index, ...]]:
    """Split a selection into a contiguous range of the leading dimension and an index into what was
    read.

    Args:
        selection: int, slice, ``...`` or a tuple of them, as for a tensor.
        shape: the whole tensor's shape.

    Returns:
        (start, stop, rest): ``tensor[selection] == tensor[start:stop][rest]``. A tensor without
        dimensions is (0, 1, (0,)), to be read as one with a leading dimension of 1.

    Raises:
        IndexError: an integer outside the dimension, or a negative step.
    """
    parts = selection if isinstance(selection, tuple) else (selection,)
    if not shape:
        return 0, 1, (0,)
    if not parts or parts[0] is ...:
        return 0, shape[0], parts
    first = parts[0]
    if isinstance(first, slice):
        start, stop, step = first.indices(shape[0])
        if step < 0:
            raise IndexError(f"selection with a negative step: {first}")
        return start, max(start, stop), (slice(None, None, step), *parts[1:])
    assert not isinstance(first, EllipsisType)
    at = first + shape[0] if first < 0 else first
    if not 0 <= at < shape[0]:
        raise IndexError(f"index {first} outside a dimension of {shape[0]}")
    return at, at + 1, (0, *parts[1:])


def cut(rows: Tensor, rest: tuple[Index, ...]) -> Tensor:
    """Apply the second half of `leading`; contiguous, so that a small cut does not keep the rest
    alive as a view.
    """
    whole = all(i is ... or i == slice(None) or i == slice(None, None, 1) for i in rest)
    if whole:
        return rows
    out = rows[rest]
    return out if out.numel() == rows.numel() else out.clone()
