"""Memory for weights that are decoded for the time of a product: kept for the next one, since fresh
pages cost as much as decoding."""

import threading

import torch
from torch import Tensor

MOST_KEPT = 64 << 20  # bytes, of each thread
_KEPT = threading.local()


def kept_room(size: int) -> Tensor:
    """Memory of this thread, uint8 [size or more], until it asks again."""
    room: Tensor | None = getattr(_KEPT, "room", None)
    if room is None or room.numel() < size:
        room = torch.empty(size, dtype=torch.uint8)
        if size <= MOST_KEPT:
            _KEPT.room = room
    return room
