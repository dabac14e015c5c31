"""Calibration and evaluation batches from text, for decoder-only and encoder-decoder models, and
what of them to learn from.

Knows nothing about experts or solvers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qmoe.calib.default_text import windows as default_windows
from qmoe.calib.text import beginning, span_corruption, windows
from qmoe.errors import CalibrationError

_TOKENS_AT_ONCE = 4096  # bounds the logits: 4096 x vocabulary x 4 bytes for each model

_SHOWN = 80  # characters of a line
SPAN_WINDOW = 180  # tokens of text behind one span-corruption sample where the context allows it


def prepare(
    tokenizer: Any,
    config: Any,
    source: str | None,
    tokens: int,
    ctx: int,
    seed: int,
    **rows: Any,
) -> dict[str, Tensor]:
    """One batch of all samples: the model's inputs and `labels` (-100 where nothing is scored).

    Args:
        tokenizer: of the model.
        config: the model's config; decides between windows (decoder-only) and span corruption
            (encoder-decoder).
        source: text file or data set, see `qmoe.calib.text`; None is the text of the package,
            which takes none of the options for rows.
        tokens: at most this many tokens of text.
        ctx: tokens of a window.
        seed: of the masked spans.
        rows: `pack`, `chat`, `column` and `bos` of `qmoe.calib.text.windows`.

    Raises:
        CalibrationError: the text is shorter than one window.
    """
    if source is None and set(rows) - {"bos"}:
        raise CalibrationError(
            "--calib-column, --calib-pack and --calib-chat say how rows of --calib are read; "
            "give --calib with them"
        )
    masked = config.is_encoder_decoder  # its windows are cut by masks, and then begin
    bos = rows.get("bos", "auto")
    window, options = min(ctx, SPAN_WINDOW) if masked else ctx, {**rows, "bos": bos}
    if masked:
        options["bos"] = "off"
    if source is None:
        ids = default_windows(tokenizer, tokens, window, **options)
    else:
        ids = windows(tokenizer, source, tokens, window, seed, **options)
    if not masked:
        return {"input_ids": ids, "labels": ids}
    return span_corruption(ids, tokenizer, seed, start=beginning(tokenizer, bos))


def check_tokens(batch: dict[str, Tensor], tokenizer: Any, rows: int) -> None:
    """Every token has an embedding.

    Args:
        batch: see `prepare`.
        tokenizer: that made it.
        rows: of the model's input embeddings.

    Raises:
        CalibrationError: with the first token that has none.
    """
    for ids in batch.values():
        if int(ids.max()) >= rows:
            beyond = int(ids[ids >= rows][0])
            raise CalibrationError(
                f"token {tokenizer.convert_ids_to_tokens(beyond)!r} of the text has number "
                f"{beyond}, but the model's embeddings have {rows} rows; use the tokenizer that "
                "the model was trained with, or resize the embeddings"
            )


def described(batch: dict[str, Tensor], tokenizer: Any, bos: str = "auto") -> str:
    """What samples look like, for people: how they begin, and the first line of the first."""
    ids = batch["input_ids"]
    start = begun(ids, tokenizer, bos)
    if start:
        said = " beginning with " + repr("".join(tokenizer.convert_ids_to_tokens(start)))
    else:
        said = " beginning with no special token"
    text = tokenizer.decode(ids[0].tolist()[len(start) :])
    line = next((s for s in text.splitlines() if s.strip()), "")
    shown = line if len(line) <= _SHOWN else line[:_SHOWN] + "…"
    return f"text: {len(ids)} windows of {ids.shape[1]} tokens, each{said}; the first: {shown!r}"


def begun(ids: Tensor, tokenizer: Any, bos: str = "auto") -> list[int]:
    """The tokens with which windows int64 [n, ctx] begin, of those that may stand there; none in
    chats whose template begins otherwise."""
    start = beginning(tokenizer, bos)
    return start if ids[0, : len(start)].tolist() == start else []


def inputs_only(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch without its labels, as a forward for calibration wants it."""
    return {k: v for k, v in batch.items() if k != "labels"}


def learnable(batches: Sequence[dict[str, Tensor]], tokenizer: Any, decoder: bool) -> list[Tensor]:
    """For every batch, bool [tokens]: False at special and padding tokens, which no Hessian should
    see.

    Args:
        batches: inputs of the forward.
        tokenizer: knows its special ids.
        decoder: take the decoder's inputs of an encoder-decoder batch.
    """
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.long)
    keep = []
    for batch in batches:
        ids = batch["decoder_input_ids"] if decoder else batch["input_ids"]
        keep.append(~torch.isin(ids.flatten(), special))
    return keep


def split_batches(
    batch: dict[str, Tensor], tokens_at_once: int = _TOKENS_AT_ONCE
) -> list[dict[str, Tensor]]:
    """Cuts one big batch [n, T] into batches of at most about `tokens_at_once` tokens (at least one
    row each).
    """
    rows = max(1, tokens_at_once // max(1, max(v.shape[1] for v in batch.values())))
    parts = {k: v.split(rows) for k, v in batch.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
