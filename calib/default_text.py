"""The calibration text that comes with the package: `qmoe compress MODEL OUT` uses it.

Its rows are plain text or dialogues, shuffled so that every beginning of it is a mix of all kinds;
default/README.md names the sources.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from qmoe.calib.text import beginning, cut, encode_messages, token_ids
from qmoe.errors import CalibrationError
from qmoe.system.files import file_sha256

NAME = "bundled"  # how manifests and points call it
_ROWS = Path(__file__).parent / "default" / "text.jsonl"
_BETWEEN = "\n\n\n"  # rows, where the tokenizer has no end-of-text token


def rows() -> Iterator[dict[str, Any]]:
    """{"source", "text"} or {"source", "messages"} of every row, in order."""
    with _ROWS.open(encoding="utf-8") as f:
        for line in f:
            yield json.loads(line)


def sha256() -> str:
    """Of the file."""
    return file_sha256(_ROWS)


def token_stream(tokenizer: Any) -> Iterator[list[int]]:
    """The ids of every row with what ends it: the end-of-text token, or empty lines where the
    tokenizer has none. Dialogues go through the chat template where there is one, which ends them
    itself; else one turn follows another as paragraphs.
    """
    end = [tokenizer.eos_token_id]
    if end == [None]:
        end = token_ids(tokenizer, _BETWEEN)
    for row in rows():
        messages = row.get("messages")
        if messages and _has_template(tokenizer):
            yield encode_messages(tokenizer, messages)
        else:
            text = "\n\n".join(m["content"] for m in messages) if messages else row["text"]
            yield [*token_ids(tokenizer, text), *end]


def windows(tokenizer: Any, tokens: int, ctx: int, bos: str = "auto") -> Tensor:
    """The first windows of the text; rows follow one another, as documents that are packed.

    Args:
        tokenizer: of the model.
        tokens: how many are wanted.
        ctx: tokens per window.
        bos: what begins a window, see `qmoe.calib.text.windows`.

    Returns:
        int64 [n, ctx], 1 <= n <= tokens // ctx; fewer than wanted where the text ends.

    Raises:
        CalibrationError: not one window.
    """
    if ctx < 2 or tokens < ctx:
        raise CalibrationError(
            f"{tokens} tokens in windows of {ctx}: ask for at least one window of two tokens"
        )
    count = tokens // ctx
    ids: list[int] = []
    for row in token_stream(tokenizer):
        ids += row
        if len(ids) >= count * ctx:
            break
    return cut(ids, count, ctx, NAME, beginning(tokenizer, bos))


def _has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def describe(tokenizer: Any, wanted: int, got: int) -> str:
    """One sentence for the plan.

    Args:
        tokenizer: of the model.
        wanted, got: tokens that were asked for and that there are.
    """
    kinds = "prose in 20 languages, code, mathematics, dialogue"
    if _has_template(tokenizer):
        kinds += " in the model's chat template"
    short = f" of {wanted} asked for (it holds no more)" if got < 0.9 * wanted else ""
    return (
        f"calibration: the bundled text ({kinds}), {got} tokens{short}; "
        "--calib takes text that is nearer to what the model will be used for"
    )
