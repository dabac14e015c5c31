"""Acting when somebody else's module has been imported, without importing it."""

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any


def after_import(name: str, act: Callable[[], object]) -> None:
    """Calls `act` once: now, if the module is there already, else when its first import is
    through."""
    if name in sys.modules:
        act()
    else:
        sys.meta_path.insert(0, _After(name, act))


class _After(MetaPathFinder):
    """Steps aside at the first import of a module, and acts when that is through."""

    def __init__(self, name: str, act: Callable[[], object]) -> None:
        self.name, self.act = name, act

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader, run = spec.loader, spec.loader.exec_module

        def exec_module(module: Any) -> None:
            del loader.exec_module  # the loader is its own again
            run(module)
            self.act()

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
