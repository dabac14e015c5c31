"""`qmoe eval`: load a checkpoint, compressed or not, and score it on a text, beside a reference if
asked.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from qmoe.calib.batches import check_tokens, described, prepare, split_batches
from qmoe.errors import SourceError, UnsupportedModelError
from qmoe.inference.load import load
from qmoe.measure.perplexity import Score, score_batches
from qmoe.models.auto import building
from qmoe.models.classes import (
    embeddings,
    model_class,
    read_config,
    read_tokenizer,
    vocabulary,
)
from qmoe.models.families.find import NoExpertsError, repair, take_any_width
from qmoe.models.streamed import StreamedModel
from qmoe.source.checkpoint import Checkpoint, directory_of, open_checkpoint
from qmoe.store.manifest import MANIFEST
from qmoe.store.writer import INDEX
from qmoe.system.machine import pick_device


def evaluate(
    model: str,
    text: str,
    reference: str | None = None,
    *,
    ctx: int = 1024,
    tokens: int | None = None,
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: bool = False,
    say: Callable[[str], object] = lambda text: None,
    rows: Mapping[str, Any] | None = None,
) -> Score:
    """Perplexity of a checkpoint on a text, and its divergence from a reference.

    Args:
        model: directory or hub id, "owner/name" or "owner/name@revision".
        text: evaluation text, see `qmoe.calib.text`.
        reference: directory or hub id of the model to compare with.
        ctx: tokens of a window.
        tokens: at most this many tokens of the text; None takes all of a local file.
        dtype: "float32" or "bfloat16", the compute dtype of both models.
        device: "auto", "cpu", "cuda" or "cuda:N".
        trust_remote_code: run the model and tokenizer code that the checkpoints bring along.
        progress: draw a bar.
        say: receives what the text looks like to the model.
        rows: how it is read: `pack`, `chat`, `column`, `bos` of qmoe.calib.text.windows.

    Raises:
        SourceError: no such checkpoint, or the reference has another vocabulary.
        CalibrationError: the text is shorter than one window.
    """
    where = pick_device(device)
    first = load_any(model, dtype, where, trust_remote_code)
    other = load_any(reference, dtype, where, trust_remote_code) if reference else None
    if other is not None and vocabulary(other) != vocabulary(first):
        raise SourceError(
            f"{model} has {vocabulary(first)} tokens and {reference} has {vocabulary(other)}; "
            "KL needs one vocabulary"
        )
    tokenizer = read_tokenizer(directory_of(model), trust_remote_code)
    rows = rows or {}
    data = prepare(tokenizer, first.config, text, tokens or 2**40, ctx, seed=0, **rows)
    check_tokens(data, tokenizer, embeddings(first))
    say(f"evaluation {described(data, tokenizer, rows.get('bos', 'auto'))}")
    with building(model if reference is None else f"{model} or {reference}", what="run"):
        return score_batches(first, split_batches(data), other, progress)


def load_any(model: str, dtype: str, device: torch.device, trust_remote_code: bool = False) -> Any:
    """A model in eval mode from a compressed or plain checkpoint, directory or hub id.

    Raises:
        SourceError: a plain checkpoint that cannot be read. CorruptError: a compressed one.
        UnsupportedModelError: a model type that transformers does not know.
    """
    kind = getattr(torch, dtype)
    if is_compressed(directory_of(model)):
        return load(model, dtype=kind, trust_remote_code=trust_remote_code).to(device).eval()
    checkpoint = open_checkpoint(model)  # one clear sentence for whatever is wrong with it
    try:
        loaded = StreamedModel(checkpoint, kind, trust_remote_code).whole()
    except NoExpertsError:
        loaded = _dense(checkpoint, model, kind, trust_remote_code)
    repair(loaded)
    take_any_width(loaded)
    return loaded.to(device).eval()


def _dense(checkpoint: Checkpoint, model: str, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """A model without experts, which transformers loads itself."""
    if checkpoint.quantization is not None:
        raise UnsupportedModelError(
            f"{model} is a quantized model without experts; use its bf16 checkpoint"
        )
    cls, config = model_class(
        read_config(checkpoint, trust_remote_code), checkpoint, trust_remote_code
    )
    commit = checkpoint.origin.get("revision")  # what was opened, if the branch has moved on since
    with building(str(checkpoint.directory), what="load"):
        loaded, info = cls.from_pretrained(
            checkpoint.origin["name"] if commit else model,
            config=config,
            dtype=dtype,
            revision=commit or "main",
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    if info["missing_keys"]:
        raise SourceError(
            f"{model}: no tensor on disk for {min(info['missing_keys'])}; the checkpoint is "
            "incomplete or does not match config.json"
        )
    return loaded


def is_compressed(folder: Path) -> bool:
    """Whether a directory holds, or should hold, a compressed checkpoint."""
    return (folder / MANIFEST).exists() or (folder / INDEX).exists()


def score_text(score: Score) -> str:
    """The result for people."""
    lines = [
        f"perplexity {score.perplexity:.3f}   ({score.nll:.4f} nats over {score.tokens} tokens)"
    ]
    if score.reference_nll is not None:
        found = score.as_dict()
        rise = 100 * (score.perplexity / found["reference_perplexity"] - 1)
        lines.append(f"reference  {found['reference_perplexity']:.3f}   ({rise:+.2f} %)")
        lines.append(
            f"KL {score.kl:.5f} nats   "
            f"same most likely token {100 * (score.top1_agreement or 0):.1f} %"
        )
    return "\n".join(lines)
