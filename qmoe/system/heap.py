"""Free memory that the allocator keeps: given back to the system between blocks.

A block leaves holes between what lives on, and the next one does not fit into them exactly: without
this the resident memory of a run grows by a few MiB with every block, although nothing more is in
use.
"""

import ctypes
from collections.abc import Callable
from functools import cache


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None  # not glibc


def trim() -> bool:
    """Gives the free pages of the C heap back to the system, where its allocator is glibc's.

    Returns:
        whether this C library can.
    """
    function = _malloc_trim()
    if function is not None:
        function(0)
    return function is not None
