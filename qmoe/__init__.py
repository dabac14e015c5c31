"""Mixture-of-experts models below one bit per expert weight, run without unpacking.

Importing the package registers the format with transformers, as soon as that is imported too; the
names below are imported when they are first used.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from qmoe.errors import (
    CalibrationError,
    CapacityError,
    CorruptError,
    FormatVersionError,
    HubError,
    InterruptedRunError,
    LostProcessError,
    NonFiniteError,
    OutputError,
    QmoeError,
    SourceError,
    UnsupportedModelError,
)
from qmoe.version import __version__

if TYPE_CHECKING:
    from qmoe.compression.pipeline import Settings
    from qmoe.compression.pipeline import compress_checkpoint as compress
    from qmoe.compression.report import CompressReport
    from qmoe.inference.load import load
    from qmoe.measure.perplexity import Score
    from qmoe.measure.score import score_checkpoint as evaluate
    from qmoe.publish.export import export
    from qmoe.publish.push import Pushed, push
    from qmoe.publish.verify import Verified, verify
    from qmoe.store.inspect import Inspection, inspect

_FACE = {
    "CompressReport": "qmoe.compression.report:CompressReport",
    "Inspection": "qmoe.store.inspect:Inspection",
    "Pushed": "qmoe.publish.push:Pushed",
    "Score": "qmoe.measure.perplexity:Score",
    "Settings": "qmoe.compression.pipeline:Settings",
    "Verified": "qmoe.publish.verify:Verified",
    "compress": "qmoe.compression.pipeline:compress_checkpoint",
    "evaluate": "qmoe.measure.score:score_checkpoint",
    "export": "qmoe.publish.export:export",
    "inspect": "qmoe.store.inspect:inspect",
    "load": "qmoe.inference.load:load",
    "push": "qmoe.publish.push:push",
    "verify": "qmoe.publish.verify:verify",
}

__all__ = [
    "CalibrationError",
    "CapacityError",
    "CompressReport",
    "CorruptError",
    "FormatVersionError",
    "HubError",
    "Inspection",
    "InterruptedRunError",
    "LostProcessError",
    "NonFiniteError",
    "OutputError",
    "Pushed",
    "QmoeError",
    "Score",
    "Settings",
    "SourceError",
    "UnsupportedModelError",
    "Verified",
    "__version__",
    "compress",
    "evaluate",
    "export",
    "inspect",
    "load",
    "push",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module 'qmoe' has no attribute {name!r}")
    module, attribute = _FACE[name].split(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__


def _register() -> None:
    from qmoe.inference.registration import register

    register()


class _AfterTransformers(MetaPathFinder):
    """Registers when the import of transformers is through. Importing it here instead would cost
    every ``qmoe --help`` and every script that needs no model several seconds."""

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


if "transformers" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterTransformers())
