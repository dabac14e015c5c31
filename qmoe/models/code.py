"""``--with-code``: a few lines of Python in a checkpoint, so that ``trust_remote_code=True`` loads
it where nobody imports qmoe (the package must be installed all the same)."""

from typing import Any

from qmoe.errors import UnsupportedModelError
from qmoe.models.auto import auto_class

FILE = "modeling_qmoe.py"
_CODE = '''"""Lets ``trust_remote_code=True`` load this checkpoint without an ``import qmoe``.

The package itself is needed: pip install qmoe.
"""

import qmoe  # noqa: F401 - registers the format with transformers
from {config_module} import {config} as _Config
from {model_module} import {model} as _Model


class {config}(_Config):
    """As the family's own."""


class {model}(_Model):
    """As the family's own; experts stay encoded."""

    config_class = {config}
'''


def loading_code(config: Any, model_class: type) -> tuple[dict[str, bytes], dict[str, str]]:
    """The file of a model's checkpoint, and config.json's ``auto_map`` that names it.

    The classes have the family's names, so that a checkpoint saved later has the same
    ``architectures``.

    Args:
        config: the model's configuration.
        model_class: its class.

    Raises:
        UnsupportedModelError: the model brings code of its own.
    """
    if getattr(config, "auto_map", None):
        raise UnsupportedModelError(
            "--with-code: the model brings code of its own, for which trust_remote_code is used "
            "already; leave it out, and import qmoe"
        )
    kind = type(config)
    text = _CODE.format(
        config=kind.__name__,
        config_module=kind.__module__,
        model=model_class.__name__,
        model_module=model_class.__module__,
    )
    module = FILE.removesuffix(".py")
    auto = {
        "AutoConfig": f"{module}.{kind.__name__}",
        auto_class(config).__name__: f"{module}.{model_class.__name__}",
    }
    return {FILE: text.encode("utf-8")}, auto
