"""Sums of a score, without a real model."""

from types import SimpleNamespace

import pytest
import torch

from qmoe.errors import CalibrationError
from qmoe.measure.perplexity import score_batches


class Model:
    """Logits of two tokens, the same at every position, so that every token costs the same."""

    device = torch.device("cpu")
    config = SimpleNamespace(is_encoder_decoder=False)

    def __init__(self, logits):
        self.row = torch.tensor(logits)

    def __call__(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.row.expand(*input_ids.shape, 2))


def _batch(tokens):
    ids = torch.zeros(1, tokens + 1, dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


def test_sums_are_float64_within_a_batch_too():
    model, other = Model([0.1, 0.0]), Model([0.7, 0.0])
    one = score_batches(model, [_batch(1)], other)
    many = score_batches(model, [_batch((1 << 20) + 7)], other)
    for name in ("nll", "reference_nll", "kl"):
        assert getattr(many, name) == pytest.approx(getattr(one, name), rel=1e-12)


def test_nothing_to_score_is_said():
    batch = _batch(4)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.raises(CalibrationError, match="no token of the text is scored"):
        score_batches(Model([0.1, 0.0]), [batch])
