"""Imports that wait until they are needed: the names of the package, and what transformers must
learn. Importing torch and transformers takes seconds, which ``qmoe --help`` need not spend.
"""

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any


def attribute(name: str, places: Mapping[str, str]) -> Any:
    """The object called `name`, from the module that `places` ("module:name") says.

    Raises:
        AttributeError: there is none, in the words of Python.
    """
    if name not in places:
        raise AttributeError(f"module 'qmoe' has no attribute {name!r}")
    module, inner = places[name].split(":")
    return getattr(import_module(module), inner)


def when_transformers_is_imported() -> None:
    """Registers the format and our model classes: now, if transformers is there already, else when
    its import is through."""
    if "transformers" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterTransformers())


def _register() -> None:
    from qmoe.inference.registration import register

    register()


class _AfterTransformers(MetaPathFinder):
    """Steps aside at the first import of transformers, and registers when that is through."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader, run = spec.loader, spec.loader.exec_module

        def exec_module(module: Any) -> None:
            del loader.exec_module  # the loader is its own again
            run(module)
            _register()

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
