"""A bounded store of decoded things, least recently used first out. Knows nothing about what it
holds."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Self

from qmoe.errors import QmoeError

CACHE_VARIABLE = "QMOE_CACHE_BYTES"


def environment_bytes() -> int:
    """The bound of decoded matrices that the environment asks for; 0 if it says nothing.

    Raises:
        QmoeError: the variable is no number.
    """
    text = os.environ.get(CACHE_VARIABLE, "0")
    if not text.isdecimal():
        raise QmoeError(f"{CACHE_VARIABLE} is {text!r}; it must be a number of bytes")
    return int(text)


class ByteCache:
    """Holds values of known size, never more than `capacity` bytes of them. Safe to use from
    several threads."""

    def __init__(self, capacity: int) -> None:
        """Args: capacity: bytes; 0 keeps nothing."""
        if capacity < 0:
            raise ValueError(f"a cache cannot hold {capacity} bytes")
        self.capacity = capacity
        self.used = 0
        self._items: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any], size: Callable[[Any], int]) -> Any:
        """The value of `key`, made and (if it fits) kept if it is not there.

        Args:
            key: identity of the value.
            make: computes it.
            size: its bytes.
        """
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
                return self._items[key][0]
        value = make()  # outside the lock: it is slow, and making it twice is harmless
        n = size(value)
        if n <= self.capacity:
            with self._lock:
                self._drop(key)
                while self.used + n > self.capacity:
                    self._drop(next(iter(self._items)))
                self._items[key] = (value, n)
                self.used += n
        return value

    def _drop(self, key: Hashable) -> None:
        if key in self._items:
            self.used -= self._items.pop(key)[1]

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._items.clear()
            self.used = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(self.capacity)  # a copied model decodes for itself

    def __reduce__(self) -> tuple[type[Self], tuple[int]]:
        return type(self), (self.capacity,)
