"""A bounded store of decoded things, least recently used first out. Knows nothing about what it
holds."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
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

    def __init__(self, capacity: int, *, evict: bool = True) -> None:
        """Args:
        capacity: bytes; 0 keeps nothing.
        evict: whether a new value drives out old ones. If not, what came first stays: for values
            that are used in turn, all of which would otherwise be driven out before their next use.
        """
        if capacity < 0:
            raise ValueError(f"a cache cannot hold {capacity} bytes")
        self.capacity, self._evict = capacity, evict
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
                if not self._evict and self.used + n > self.capacity:
                    return value
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
        return type(self)(self.capacity, evict=self._evict)  # a copied model decodes for itself

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return partial(type(self), evict=self._evict), (self.capacity,)
