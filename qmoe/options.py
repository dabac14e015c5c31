"""Options of the command line that leave every default to the function that is called."""

from collections.abc import Callable
from typing import Any

import click


def option(*names: str, default: str, help: str = "", **more: Any) -> Callable[..., Any]:
    """An option that is passed on only if it is given; its help quotes the default."""
    text = f"{help} [default: {default}]".strip()
    return click.option(*names, default=None, help=text, **more)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that the user wrote."""
    return {name: value for name, value in options.items() if value not in (None, False)}


device = option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
