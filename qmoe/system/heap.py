"""Memory of this process: its peak, and free pages given back to the system between blocks.

A block leaves holes between what lives on, and the next one does not fit into them exactly: without
this the resident memory of a run grows by a few MiB with every block, although nothing more is in
use.
"""

import ctypes
import re
import resource
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path


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


def peak_rss_bytes() -> int:
    """Peak resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says begins with the peak of the process that started us
        found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(encoding="ascii"), re.M)
        if found:
            return int(found.group(1)) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
