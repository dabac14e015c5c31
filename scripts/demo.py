"""The bundled model through every step of a user: compress, verify, load, generate, evaluate.

Prints one table (also the README's) and ends in one JSON line.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

import qmoe
from qmoe.compression.pipeline import compress
from qmoe.compression.settings import Settings
from qmoe.measure.score import evaluate
from qmoe.publish.verify import verify

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "examples" / "tiny-domains"
TEXTS = ROOT / "examples" / "text" / "domains"
DOMAINS = {"English": "dev_en", "Chinese": "dev_zh", "Python": "dev_py"}
CALIB_TOKENS, TOKENS, CTX = 32768, 16384, 256
METHODS = ({"method": "rtn"}, {"method": "qmoe"}, {"method": "rd", "bits": 0.8})
PROMPT = "def __init__(self, "
HEAD = (
    "| method | text | stored bits | bits as read | experts under 0.1 bit | KL "
    "| perplexity, before | after |\n|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    logging.disable_progress_bar()
    keep = os.environ.get("QMOE_DEMO_OUT")
    folder = Path(keep or tempfile.mkdtemp(prefix="qmoe-demo-"))
    rows = []
    try:
        for options in METHODS:
            rows += measure(folder, options)
        show(rows)
        sample(folder / "rd")
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"calib_tokens": CALIB_TOKENS, "ctx": CTX, "rows": rows}))


def measure(folder: Path, options: dict) -> list[dict]:
    """Compresses by one method and scores every domain: a row for each."""
    name, shown = options["method"], sys.stderr.isatty()
    print(f"compressing {SOURCE.name} with --method {name} ...", file=sys.stderr)
    calib = str(TEXTS / "calib_mix.txt")
    settings = Settings(calib=calib, calib_tokens=CALIB_TOKENS, ctx=CTX, **options)
    report = compress(str(SOURCE), folder / name, settings, progress=shown)
    verify(folder / name)
    rows = []
    for domain, text in DOMAINS.items():
        path = str(TEXTS / f"{text}.txt")
        score = evaluate(
            str(folder / name), path, str(SOURCE), ctx=CTX, tokens=TOKENS, progress=shown
        )
        rows.append({"method": name, "domain": domain, **report.as_dict(), **score.as_dict()})
    return rows


def show(rows: list[dict]) -> None:
    first = rows[0]
    print(
        f"\n{SOURCE.name}: {first['expert_weights'] / 1e6:.1f} M expert weights in "
        f"{first['experts']} experts, calibrated on a mix of the three kinds of text; "
        f"{first['tokens']} scored tokens of each, context {CTX}\n"
    )
    print(HEAD)
    for r in rows:
        print(
            f"| `{r['method']}` | {r['domain']} | {r['bits_per_weight']:.3f} "
            f"| {r['bits_as_read']:.3f} | {r['experts_below_floor']} | {r['kl']:.4f} "
            f"| {r['reference_perplexity']:.2f} | {r['perplexity']:.2f} |"
        )
    seconds = {r["method"]: f"`{r['method']}` {r['seconds']:.0f} s" for r in rows}
    smallest = rows[-1]
    print(
        f"\n{smallest['source_bytes']:,} bytes before, {smallest['stored_bytes']:,} by `rd`; "
        f"compression took {', '.join(seconds.values())}"
    )


def sample(directory: Path) -> None:
    """A few words from the smallest model, loaded as any user would."""
    model = qmoe.load(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    torch.manual_seed(0)
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=0)
    print(f"\nrd model says: {tokenizer.decode(out[0])!r}\n")


if __name__ == "__main__":
    main()
