"""Calibration and evaluation batches from text, for decoder-only and encoder-decoder models, and
what of them to learn from.

Knows nothing about experts or solvers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qmoe.calib.default_text import windows as default_windows
from qmoe.calib.text import span_corruption, windows
from qmoe.errors import CalibrationError

_TOKENS_AT_ONCE = 4096  # bounds the logits: 4096 x vocabulary x 4 bytes for each model

SPAN_WINDOW = 180  # tokens of text behind one span-corruption sample where the context allows it


def prepare(
    tokenizer: Any,
    config: Any,
    source: str | None,
    tokens: int,
    ctx: int,
    seed: int,
    *,
    pack: bool = False,
    chat: bool = False,
    column: str = "text",
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
        pack, chat, column: what rows of jsonl, parquet and data sets become, see `qmoe.calib.text`.

    Raises:
        CalibrationError: the text is shorter than one window.
    """
    window = min(ctx, SPAN_WINDOW) if config.is_encoder_decoder else ctx
    if source is None:
        if pack or chat or column != "text":
            raise CalibrationError(
                "--calib-column, --calib-pack and --calib-chat say how rows of --calib are read; "
                "give --calib with them"
            )
        ids = default_windows(tokenizer, tokens, window)
    else:
        ids = windows(tokenizer, source, tokens, window, seed, pack=pack, chat=chat, column=column)
    if not config.is_encoder_decoder:
        return {"input_ids": ids, "labels": ids}
    return span_corruption(ids, tokenizer, seed)


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
