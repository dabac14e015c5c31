"""Options of the command line that leave every default to the function that is called."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import click


def option(*names: str, default: str, help: str = "", **more: Any) -> Callable[..., Any]:
    """An option that is passed on only if it is given; its help quotes the default."""
    text = f"{help} [default: {default}]".strip()
    return click.option(*names, default=None, help=text, **more)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that the user wrote; a number 0 is one."""
    return {n: v for n, v in options.items() if v is not None and v is not False}


device = option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")


if TYPE_CHECKING:  # in newer versions of click alone it takes a parameter
    _Type = click.ParamType[int]
else:
    _Type = click.ParamType


class Bytes(_Type):
    """A size such as 8GiB, 500MB or a plain number of bytes."""

    name = "size"
    _units: ClassVar = {
        "": 1,
        "b": 1,
        "kb": 10**3,
        "mb": 10**6,
        "gb": 10**9,
        "kib": 2**10,
        "mib": 2**20,
    }
    _units |= {"gib": 2**30, "tib": 2**40, "tb": 10**12}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(value))
        if not found or found.group(2).lower() not in self._units:
            self.fail(
                f"{value!r} is not a size; write 8GiB, 500MB or a number of bytes", param, ctx
            )
        return int(float(found.group(1)) * self._units[found.group(2).lower()])


TEXTS = ".txt, .json, .jsonl, .csv, .parquet or a datasets name"
_ROWS = ("column", "pack", "chat", "bos")


def rows(prefix: str) -> Callable[[Any], Any]:
    """The options that say how text is read, under names with a prefix."""
    options = (
        option(
            f"--{prefix}column",
            default="text",
            help="Column of the text or messages in json, csv, parquet or a dataset.",
        ),
        click.option(
            f"--{prefix}pack",
            is_flag=True,
            help="Join documents by the end-of-text token; else no window straddles two.",
        ),
        click.option(
            f"--{prefix}chat",
            is_flag=True,
            help="Apply the chat template to each row's messages (or its text); packs.",
        ),
        option(
            f"--{prefix}bos",
            default="auto",
            type=click.Choice(["auto", "on", "off"]),
            help="The begin-of-text token before every window; auto: as the tokenizer adds it.",
        ),
    )

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def taken_rows(given: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Takes those options out of what was given."""
    return {k: given.pop(f"{prefix}{k}") for k in _ROWS if f"{prefix}{k}" in given}
