"""Perplexity of a model on text, and its KL divergence from a reference, in one pass over both.

Decoder-only models are scored on every token of a window but its first; encoder-decoder models on
the tokens of masked spans (T5's span corruption). All arithmetic of the scores is float32 with
float64 sums.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from qmoe.errors import CalibrationError, NonFiniteError


@dataclass(frozen=True)
class Score:
    """What `qmoe eval` reports.

    Attributes:
        nll: mean negative log likelihood in nats per predicted token.
        tokens: predicted tokens.
        reference_nll: the reference model's, or None without one.
        kl: mean KL(reference || model) in nats per predicted token, or None.
        top1_agreement: share of positions at which both models' most likely token is the same, or
            None.
    """

    nll: float
    tokens: int
    reference_nll: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll)

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `qmoe eval`."""
        out: dict[str, Any] = {
            "perplexity": self.perplexity,
            "nll": self.nll,
            "tokens": self.tokens,
        }
        if self.reference_nll is not None:
            out |= {
                "reference_perplexity": math.exp(self.reference_nll),
                "reference_nll": self.reference_nll,
                "kl": self.kl,
                "top1_agreement": self.top1_agreement,
            }
        return out


@torch.no_grad()
def score_batches(
    model: Any,
    batches: Sequence[dict[str, Tensor]],
    reference: Any | None = None,
    progress: bool = False,
) -> Score:
    """Scores `model` on prepared batches.

    Args:
        model: a transformers model (AutoModelForCausalLM or AutoModelForSeq2SeqLM) in eval mode.
        batches: keyword arguments of the model's forward, each with `labels`: [B, T] token ids with
            -100 where nothing is scored. Decoder-only labels are the inputs themselves (shifted
            here); encoder-decoder ones are the targets.
        reference: a second model with the same vocabulary, run on the same batches.
        progress: draw a bar.

    Raises:
        NonFiniteError: a model's logits hold NaN or Inf.
        CalibrationError: the labels score nothing.
    """
    sums = dict.fromkeys(("nll", "reference", "kl", "same"), 0.0)
    tokens = 0
    for batch in tqdm(batches, desc="evaluate", unit="batch", disable=not progress):
        logits, labels = _predictions(model, batch)
        tokens += len(labels)
        log_p = F.log_softmax(logits, -1)
        sums["nll"] += _total(F.nll_loss(log_p, labels, reduction="none"))
        if reference is not None:
            ref_logits, _ = _predictions(reference, batch)
            log_r = F.log_softmax(ref_logits, -1)
            sums["reference"] += _total(F.nll_loss(log_r, labels, reduction="none"))
            kl = F.kl_div(log_p, log_r, reduction="none", log_target=True)
            sums["kl"] += _total(kl.sum(-1))
            sums["same"] += float((logits.argmax(-1) == ref_logits.argmax(-1)).sum())
    if tokens == 0:
        raise CalibrationError("no token of the text is scored; give text of at least two tokens")
    if reference is None:
        return Score(sums["nll"] / tokens, tokens)
    return Score(
        sums["nll"] / tokens,
        tokens,
        sums["reference"] / tokens,
        sums["kl"] / tokens,
        sums["same"] / tokens,
    )


def _total(per_token: Tensor) -> float:
    """The sum in float64 of float32 values, one for each token."""
    return float(per_token.double().sum())


def _predictions(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits [n, vocabulary] float32 and labels [n] of the scored positions."""
    device = model.device
    inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
    labels = batch["labels"].to(device)
    logits = model(**inputs, use_cache=False).logits
    if not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    scored = labels != -100
    logits = logits[scored].float()
    if not torch.isfinite(logits).all():
        raise NonFiniteError(
            f"{type(model).__name__}: its logits hold NaN or Inf; the weights are damaged "
            "or the dtype overflows"
        )
    return logits, labels[scored]
