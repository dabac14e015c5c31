"""Imports that wait until they are needed: the names of the package, and what transformers must
learn. Importing torch and transformers takes seconds, which ``qmoe --help`` need not spend.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from qmoe.system.imports import after_import


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
    after_import("transformers", _register)


def _register() -> None:
    from qmoe.inference.registration import register

    register()
