"""The model card of a compressed checkpoint: what the hub shows of it.

Written from the manifest and what `qmoe inspect` counts, so every figure in it can be checked.
Knows nothing about uploading.
"""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from qmoe.store.coverage import FEW_TOKENS
from qmoe.store.inspect import Inspection
from qmoe.system.text import markdown_table


def model_card(
    name: str,
    auto: str,
    found: Inspection,
    manifest: Mapping[str, Any],
    base: str | None = None,
    score: Mapping[str, Any] | None = None,
    own: str | None = None,
) -> str:
    """README.md for the hub: YAML front matter, then Markdown.

    Args:
        name: id of the repository, "owner/name".
        auto: name of transformers' class that loads it, "AutoModelForCausalLM".
        found: from `qmoe.store.inspect.inspect`.
        manifest: of the checkpoint.
        base: id of the model on the hub that was compressed, if it is one.
        score: what `qmoe eval --json` said, if it was run.
        own: license id of the base model as the hub spells it, if known.

    Returns:
        UTF-8 text.
    """
    front = ModelCardData(
        library_name="transformers",
        # the hub has no task for models that only fill in masked spans
        pipeline_tag="text-generation" if auto == "AutoModelForCausalLM" else None,
        base_model=base,
        base_model_relation="quantized" if base else None,
        license=own,
        tags=["qmoe", "moe", "mixture-of-experts", "quantized", found.model_type],
    )
    parts = [
        f"---\n{front.to_yaml()}\n---",
        f"# {name.rsplit('/', 1)[-1]}",
        _summary(found, manifest, base),
        "## Use\n\n" + _use(name, auto, found),
        "## Size\n\n" + _size(found),
        *(["## Quality\n\n" + _quality(score)] if score else []),
        "## Coverage\n\n" + _coverage(found, manifest),
        "## Settings\n\n" + _settings(manifest),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(found: Inspection, manifest: Mapping[str, Any], base: str | None) -> str:
    source = f"[{base}](https://huggingface.co/{base})" if base else f"`{_source(manifest)}`"
    return (
        f"{source} with its experts at **{found.bits_per_weight:.3f} bits per weight**, "
        "everything stored for them counted. The experts stay encoded in memory; entropy-coded "
        "integers are decoded inside the matrix product."
    )


def _use(name: str, auto: str, found: Inspection) -> str:
    return f"""Written by qmoe {found.versions.get("qmoe", "")}.

```
pip install qmoe    # or `pip install .` in its source
```

```python
import qmoe  # registers the format with transformers; without it the weights are not found
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

`qmoe.load("{name}")` does the same in one call. On a downloaded directory, `qmoe verify` checks
every bit, and `qmoe export` makes a plain checkpoint that any runtime reads."""


def _size(found: Inspection) -> str:
    stored, source = found.stored_bytes, found.source_bytes
    rows = [
        ("bits per expert weight, stored", f"{found.bits_per_weight:.3f}"),
        ("bits per expert weight, ideal", f"{found.ideal_bits_per_weight:.3f}"),
        ("bits per weight of the whole model", f"{found.model_bits_per_weight:.3f}"),
        ("expert weights", f"{found.expert_weights:,}"),
        ("other weights", f"{found.dense_weights:,}"),
        ("zeros among expert weights", f"{100 * found.zeros:.1f} %"),
        ("bytes", f"{stored:,}"),
    ]
    if found.coded_dense_weights:
        bits = f"{found.coded_dense_bits_per_weight:.3f}"
        rows.insert(2, ("bits per coded weight beside the experts", bits))
    if source:
        rows.append(("bytes of the source", f"{source:,} ({source / stored:.1f} times as many)"))
    note = (
        "Stored bits count streams, tables, scales, classes, offsets and padding. Ideal is the "
        "block-class entropy of the same integers plus the scales as stored."
    )
    layers = markdown_table(
        ("module", "projection", "bits", "ideal", "zeros"),
        [
            (
                f"`{r.module}`",
                r.projection,
                f"{r.bits:.3f}",
                f"{r.ideal_bits:.3f}",
                f"{100 * r.zeros:.1f} %",
            )
            for r in found.layers
        ],
    )
    every = f"<details><summary>Every layer</summary>\n\n{layers}\n\n</details>"
    return f"{markdown_table(('', ''), rows)}\n\n{note}\n\n{every}"


def _quality(score: Mapping[str, Any]) -> str:
    rows = [("perplexity", f"{score['perplexity']:.3f}")]
    before = score.get("reference_perplexity")
    if before is not None:
        rise = 100 * (score["perplexity"] / before - 1)
        rows[0] = ("perplexity", f"{score['perplexity']:.3f} ({rise:+.2f} %)")
        rows.append(("perplexity of the original", f"{before:.3f}"))
        rows.append(("KL from the original, nats per token", f"{score['kl']:.5f}"))
        rows.append(("same most likely token", f"{100 * score['top1_agreement']:.1f} %"))
    rows.append(("tokens scored", f"{score['tokens']:,}"))
    return markdown_table(("", ""), rows)


def _coverage(found: Inspection, manifest: Mapping[str, Any]) -> str:
    modules = manifest["report"]["modules"]
    seen = [n for m in modules.values() for n in m["tokens"] or ()]
    if not seen:
        return "No calibration tokens were counted."
    rows = []
    for path, module in modules.items():
        if counts := sorted(module["tokens"] or ()):
            middle = counts[len(counts) // 2]
            shown = (counts[0], middle, counts[-1], counts.count(0))
            rows.append((f"`{path}`", *(f"{n:,}" for n in shown)))
    starved = sum(0 < n < FEW_TOKENS for n in seen)
    notes: dict[str, int] = {}
    for module in modules.values():
        for note in filter(None, module["notes"] or ()):
            notes[note] = notes.get(note, 0) + 1
    told = "".join(f"\n- {count} experts: {note}" for note, count in sorted(notes.items()))
    head = ("module", "fewest tokens", "median", "most", "experts without")
    table = markdown_table(head, rows)
    return (
        f"Of {found.experts:,} experts, {seen.count(0):,} saw no calibration token and "
        f"{starved:,} fewer than {FEW_TOKENS}.{told and chr(10) + told}\n\n"
        f"<details><summary>Every layer</summary>\n\n{table}\n\n</details>"
    )


def _settings(manifest: Mapping[str, Any]) -> str:
    given = [("source", _source(manifest)), *sorted(manifest["settings"].items())]
    given += [(f"version of {name}", v) for name, v in sorted(manifest["versions"].items())]
    rows = [(name, f"`{value}`") for name, value in given if value is not None]
    return markdown_table(("", ""), rows)


def _source(manifest: Mapping[str, Any]) -> str:
    source = manifest["source"]
    revision = source.get("revision")
    return f"{source.get('name', 'unknown')}" + (f"@{revision}" if revision else "")
