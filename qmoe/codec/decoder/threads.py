"""Compiled loops on several threads: who may start them, and who must not."""

import os
import threading
from collections.abc import Callable
from typing import Any

import numba as nb
import torch

_SMALL = 1 << 18  # weights; below this (an eighth of a millisecond) one thread does it alone
_PARALLEL = threading.Lock()  # held during a parallel call: not every threading layer allows two

# A forked process cannot use its parent's threads: the copy of the lock stays held.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _PARALLEL.acquire(blocking=False))


def run(
    alone: Callable[..., None],
    shared: Callable[..., None],
    arguments: tuple[Any, ...],
    weights: int,
) -> None:
    """Calls one of two loops that compute the same.

    Args:
        alone: the loop for one thread.
        shared: the same with `prange`, for torch's number of threads.
        arguments: of both.
        weights: how much work it is.
    """
    threads = min(torch.get_num_threads(), nb.config.NUMBA_NUM_THREADS)
    if threads < 2 or weights < _SMALL or not _PARALLEL.acquire(blocking=False):
        alone(*arguments)
        return
    try:
        nb.set_num_threads(threads)
        shared(*arguments)
    finally:
        _PARALLEL.release()
