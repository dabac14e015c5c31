"""Mixture-of-experts models below one bit per expert weight, run without unpacking.

Importing the package registers the format with transformers, as soon as that is imported too; the
names below are imported when they are first used.
"""

import typing as _typing

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
from qmoe.lazy import attribute as _attribute
from qmoe.lazy import when_transformers_is_imported as _when_transformers_is_imported
from qmoe.system.loops_cache import settle_loops_cache as _settle_loops_cache
from qmoe.version import __version__

if _typing.TYPE_CHECKING:
    from qmoe.compression.pipeline import compress
    from qmoe.compression.report import CompressReport
    from qmoe.compression.settings import Settings
    from qmoe.inference.load import load
    from qmoe.measure.perplexity import Score
    from qmoe.measure.score import evaluate
    from qmoe.publish.export import Exported, export
    from qmoe.publish.push import Pushed, push
    from qmoe.publish.verify import Verified, verify
    from qmoe.store.inspect import Inspection, inspect

_FACE = {
    "CompressReport": "qmoe.compression.report:CompressReport",
    "Exported": "qmoe.publish.export:Exported",
    "Inspection": "qmoe.store.inspect:Inspection",
    "Pushed": "qmoe.publish.push:Pushed",
    "Score": "qmoe.measure.perplexity:Score",
    "Settings": "qmoe.compression.settings:Settings",
    "Verified": "qmoe.publish.verify:Verified",
    "compress": "qmoe.compression.pipeline:compress",
    "evaluate": "qmoe.measure.score:evaluate",
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
    "Exported",
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


def __getattr__(name: str) -> _typing.Any:
    return _attribute(name, _FACE)


def __dir__() -> list[str]:
    return __all__


_settle_loops_cache()
_when_transformers_is_imported()
