"""``qmoe exec``: any script, module or console command of Python with the format registered, in the
same process, so that no tool needs an ``import qmoe`` of its own."""

import os
import runpy
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec

from qmoe.errors import QmoeError


def run(command: Sequence[str]) -> None:
    """Registers with transformers, then runs a command as if it had been called itself.

    Args:
        command: ``["script.py", ...]``, ``["-m", "module", ...]`` or ``["lm_eval", ...]``: a file,
            a module, or a console command of a package in this environment, and its arguments.

    Raises:
        QmoeError: there is no such thing.
    """
    from qmoe.inference.registration import register

    register()

    name, *rest = command
    if name == "-m":
        if not rest:
            raise QmoeError("-m needs the name of a module")
        sys.argv = rest
        sys.path.insert(0, os.getcwd())  # as `python -m` does
        if not _there(rest[0]):
            raise QmoeError(f"no module named {rest[0]} in this environment")
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    if os.path.isfile(name):
        sys.argv = [name, *rest]
        sys.path.insert(0, os.path.dirname(os.path.abspath(name)))  # as `python name` does
        runpy.run_path(name, run_name="__main__")
        return
    found = entry_points(group="console_scripts", name=name)
    if not found:
        raise QmoeError(
            f"{name} is no file and no console command of a Python package in this environment; "
            "give a script, -m MODULE, or a command that pip installed here"
        )
    sys.argv = [name, *rest]
    sys.exit(next(iter(found)).load()())


def _there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # a package that it would be in is missing
        return False
