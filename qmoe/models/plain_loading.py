"""transformers' loader as streaming needs it: without its progress bar and its reading threads."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

_SWITCH = "HF_DEACTIVATE_ASYNC_LOAD"


@contextmanager
def plain_loading() -> Iterator[None]:
    """Inside, transformers loads on the calling thread and draws nothing.

    Its bar would be drawn anew for every block. Its threads are not waited for after ctrl-C, and
    one that is still reading when the interpreter ends aborts the process; also they read ahead
    without bound.
    """
    shown, before = logging.is_progress_bar_enabled(), os.environ.get(_SWITCH)
    logging.disable_progress_bar()
    os.environ[_SWITCH] = "1"
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        if before is None:
            os.environ.pop(_SWITCH, None)
        else:
            os.environ[_SWITCH] = before
