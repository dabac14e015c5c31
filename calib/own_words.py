"""Calibration text that a model says by itself, for what the user's text does not reach.

A text of one kind reaches some experts and some directions of their inputs, and tells a quantizer
that the others are not used. What a model was trained on is in the model: from a token drawn at
random from the whole vocabulary it goes on in the language and the kind of text that the token
belongs to (LLM-QAT, arXiv 2305.17888, and Williams and Aletras 2024 calibrate on nothing else).
Pieces of a few tokens are enough, many of them beside each other in a window, so that a model which
is read block by block from a disk is read `LENGTH` - 1 times for them and not once per token.

Knows nothing about how logits come about.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

LENGTH = 4  # tokens of a piece, its random first one included
_LOGITS = 2**25  # of all positions of a batch together: 128 MiB in float32
_ROWS = 1024  # of a batch at most; fixed, since it decides the rounding of sums

# logits of every batch, [rows, tokens, vocabulary] or its last position alone
Predict = Callable[[Sequence[dict[str, Tensor]]], Iterator[Tensor]]


def own_words(
    predict: Predict,
    tokenizer: Any,
    vocabulary: int,
    windows: tuple[int, int],
    seed: int,
    start: Sequence[int] = (),
) -> Tensor:
    """Windows of pieces that a model says: one token drawn at random, and what follows by the
    model's own probabilities. Special tokens do not occur but at the beginning.

    Args:
        predict: from batches ``{"input_ids": int64 [rows, tokens]}`` to logits, in order; called
            ``LENGTH - 1`` times, with pieces that grow by a token each time.
        tokenizer: knows which tokens there are and which are special.
        vocabulary: number of logits.
        windows: how many, and tokens of each.
        seed: of all draws.
        start: tokens with which every window begins, and every piece while it is said.

    Returns:
        int64 [windows, tokens].
    """
    generator = torch.Generator().manual_seed(seed)
    allowed = _ordinary(tokenizer, vocabulary)
    count, room = windows[0], windows[1] - len(start)
    rows = max(1, min(_ROWS, _LOGITS // ((len(start) + LENGTH) * vocabulary)))
    pieces = -(-count * room // (LENGTH * rows)) * rows  # batches of few rows are summed otherwise
    rounds = -(-pieces // len(allowed))  # every token is drawn once before any is drawn again
    first = torch.cat([torch.randperm(len(allowed), generator=generator) for _ in range(rounds)])
    said = allowed[first[:pieces], None]
    for _ in range(LENGTH - 1):
        batches = [{"input_ids": _behind(start, part)} for part in said.split(rows)]
        following = [_drawn(logits[:, -1], allowed, generator) for logits in predict(batches)]
        said = torch.cat([said, torch.cat(following)], 1)
    return _behind(start, said.flatten()[: count * room].view(count, room))


def _behind(start: Sequence[int], ids: Tensor) -> Tensor:
    """Rows [n, tokens] with the same tokens before each."""
    return torch.cat([torch.tensor([start], dtype=torch.long).expand(len(ids), -1), ids], 1)


def _ordinary(tokenizer: Any, vocabulary: int) -> Tensor:
    """Ids [n] of all tokens that a text may hold, ascending."""
    special = set(tokenizer.all_special_ids)
    known = min(vocabulary, len(tokenizer))
    return torch.tensor([i for i in range(known) if i not in special], dtype=torch.long)


def _drawn(logits: Tensor, allowed: Tensor, generator: torch.Generator) -> Tensor:
    """One of the allowed tokens for each row [n, vocabulary], drawn by its probability: [n, 1]."""
    sums = logits.float().cpu()[:, allowed].softmax(-1).double().cumsum(-1)
    at = torch.rand(len(sums), 1, generator=generator, dtype=torch.float64) * sums[:, -1:]
    return allowed[torch.searchsorted(sums, at).clamp_max(len(allowed) - 1)]
