"""The whole path for a checkpoint of any family, and what it proved: a row of docs/families.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from decisions import Decisions
from shrunk import family_of, make

import qmoe
from qmoe.compression.pipeline import compress
from qmoe.compression.settings import Settings
from qmoe.measure.score import load_any
from qmoe.models.families.find import repair
from qmoe.models.streamed import StreamedModel
from qmoe.publish.export import export
from qmoe.publish.verify import verify
from qmoe.source.checkpoint import open_checkpoint
from qmoe.store.reader import Container

DELTA = 0.005  # a step of rd at which tiny models take about 8 bits
KL = 1e-3  # what they may cost, with the decisions of the source's routers
# share of their own decisions that may be others; up to 1.33 % (muse_spark) was seen
FLIPS = 0.02


def run(kind: str, work: Path, tiny: Any) -> dict[str, bool | float]:
    """Takes a random model of one type through the whole path; see `prove`."""
    model = make(kind)
    model.save_pretrained(work / "source")
    return prove(work / "source", work, tiny, type(model))


def prove(
    source: Path, work: Path, tiny: Any, model_class: Any, tokens: int = 480
) -> dict[str, bool | float]:
    """Takes a checkpoint through the whole path.

    Args:
        source: a checkpoint without a tokenizer; one is written to it.
        work: where to work.
        tiny: the module tests/tiny.py.
        model_class: of transformers, that loads the export.
        tokens: of calibration.

    Returns:
        What was proven: {"compress", "logits", "generate", "save"} are True; of the compressed
        model beside the source, by `rd` at about 8 bits: "kl" is its divergence in nats per token
        with the decisions of the source's routers (at most `KL`), "own kl" with its own, "flips"
        the share of its own that are others (at most `FLIPS`).

    Raises:
        AssertionError: two models that must be equal are not. Whatever else a step raises.
    """
    tiny.save_tokenizer(source)
    text = tiny.save_text(work / "text.txt", 2 * tokens)
    settings = Settings(
        method="rd",
        delta=DELTA,
        calib=str(text),
        calib_tokens=tokens,
        ctx=24,
        unseen=0,
    )
    compress(str(source), work / "q", settings)
    passed: dict[str, bool | float] = {"compress": True}
    verify(work / "q")
    loaded = qmoe.load(work / "q", dtype=torch.float32)
    export(work / "q", work / "dense", "float32")
    dense, info = model_class.from_pretrained(work / "dense", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    carried = Container.open(work / "q").carried  # they have no module in the export either
    assert not info["unexpected_keys"] or carried, info["unexpected_keys"]
    repair(dense)
    inputs = inputs_for(dense)
    expected = logits(dense, inputs)
    _close(logits(loaded, inputs), expected)
    passed["logits"] = True
    whole = load_any(str(source), "float32", torch.device("cpu"))
    passed |= compared(whole, loaded, inputs)
    assert passed["kl"] <= KL, passed
    assert passed["flips"] <= FLIPS, passed
    ids = loaded.generate(
        inputs["input_ids"][:2], max_new_tokens=3, do_sample=False, pad_token_id=0
    )
    assert len(ids) == 2
    passed["generate"] = True
    loaded.save_pretrained(work / "again")
    again = qmoe.load(work / "again", dtype=torch.float32)
    assert torch.equal(logits(again, inputs), logits(loaded, inputs))
    passed["save"] = True
    return passed


def compared(source: Any, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far a model is from the source, see `prove`: with the source's decisions and without."""
    with Decisions() as made:
        original = logits(source, inputs)
    with Decisions(made):
        same = logits(model, inputs)
    with Decisions() as own:
        alone = logits(model, inputs)
    return {
        "kl": divergence(original, same),
        "own kl": divergence(original, alone),
        "flips": made.differing(own),
    }


def divergence(source: torch.Tensor, got: torch.Tensor) -> float:
    """Mean KL(source || got) in nats per token, of logits."""
    p, q = (torch.log_softmax(x.float(), -1).flatten(0, -2) for x in (source, got))
    return float(torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True))


def inputs_for(model: Any) -> dict[str, torch.Tensor]:
    """A token batch."""
    g = torch.Generator().manual_seed(5)
    out = {"input_ids": torch.randint(16, 50, (16, 24), generator=g)}
    if model.config.is_encoder_decoder:
        out["decoder_input_ids"] = torch.randint(16, 50, (16, 12), generator=g)
    return out


@torch.no_grad()
def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of one forward without a cache."""
    return model(**inputs, use_cache=False).logits


def _close(got: torch.Tensor, expected: torch.Tensor) -> None:
    worst = float((got - expected).abs().max())
    assert torch.isfinite(expected).all()
    assert worst <= 1e-4 * max(1.0, float(expected.abs().max())), f"logits differ by {worst}"


PUBLISHED = {  # types of which checkpoints are published in another class than the text-only one
    "dots3_note": "Dots3NoteForConditionalGeneration",
    "llama4": "Llama4ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen4_exp": "Qwen4ExpForConditionalGeneration",
}
# Types that cannot go through, with the reason.
REASONS: dict[str, str] = {
    "diffusion_gemma": "generates blocks of text by diffusion; it is no causal language model, and "
    "`qmoe compress` says so.",
    "openai_privacy_filter": "labels tokens and generates no text; `qmoe compress` says so.",
    "qwen3_omni_moe": "a pipeline of two language models and a vocoder; its thinker, "
    "`qwen3_omni_moe_thinker`, is supported.",
}
STEPS = ("compress", "logits", "generate", "save")


def attempt(kind: str, work: Path, tiny: Any) -> dict[str, Any]:
    """One row of the table for a type with the fused interface; see `row`."""
    family, reason = family_of(kind), REASONS.get(kind, "")
    if reason:
        return row(family, kind, reason=reason)
    try:
        passed = run(kind, work, tiny)
    except ImportError as e:  # transformers wants a package for this type alone
        if (e.name or "").startswith("qmoe"):
            raise
        reason = f"not run: transformers needs a package that is not installed ({e})."
        return row(family, kind, reason=reason)
    return row(family, kind, passed, work)


def attempt_published(kind: str, work: Path, tiny: Any) -> dict[str, Any]:
    """The row of a type in the class in which it is published."""
    model = make(kind, auto="AutoModelForImageTextToText")
    assert type(model).__name__ == PUBLISHED[kind]
    model.save_pretrained(work / "source")
    passed = prove(work / "source", work, tiny, type(model))
    return row(f"{family_of(kind)}, as published", kind, passed, work)


def row(
    family: str,
    kind: str,
    passed: Mapping[str, bool | float] | None = None,
    work: Path | None = None,
    reason: str = "",
) -> dict[str, Any]:
    """What a line of docs/families.md says.

    Args:
        family: for people.
        kind: model type in the source's config.json.
        passed: what `prove` returned.
        work: where they ran.
        reason: why they did not.
    """
    found = dict(passed or {})
    numbers = {n: found.pop(n, None) for n in ("kl", "own kl", "flips")}
    out = {"family": family, "kind": kind, "passed": list(found), **numbers, "reason": reason}
    if work is None:
        return out | {"source": "", "experts": ""}
    return out | {"source": stored_as(work / "source"), "experts": described(work / "q")}


def stored_as(source: Path) -> str:
    """The format of a source's experts, and what it holds that no module takes."""
    checkpoint = open_checkpoint(source)
    found = checkpoint.quantization or "plain"
    unused = StreamedModel(checkpoint).unused
    return f"{found}, {len(unused)} tensors without a module" if unused else found


def described(compressed: Path) -> str:
    """How the experts of a model are laid out."""
    container = Container.open(compressed, check=False)
    kinds = {(m.kind, tuple(p.name for p in m.projections)) for m in container.modules.values()}
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in sorted(kinds))
