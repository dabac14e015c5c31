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
SOURCE = ROOT / "examples" / "tiny-mixtral"
CALIB, DEV = (str(ROOT / "examples" / "text" / f"{n}.txt") for n in ("calib", "dev"))
TOKENS, CTX = 65536, 256
METHODS = ({"method": "rtn"}, {"method": "qmoe"}, {"method": "rd", "bits": 0.8})
PROMPT = "It was the best of times, it was"


def main() -> None:
    logging.disable_progress_bar()
    keep = os.environ.get("QMOE_DEMO_OUT")
    folder = Path(keep or tempfile.mkdtemp(prefix="qmoe-demo-"))
    rows = []
    try:
        for options in METHODS:
            name = options["method"]
            print(f"compressing {SOURCE.name} with --method {name} ...", file=sys.stderr)
            settings = Settings(calib=CALIB, calib_tokens=TOKENS, ctx=CTX, **options)
            shown = sys.stderr.isatty()
            report = compress(str(SOURCE), folder / name, settings, progress=shown)
            verify(folder / name)
            score = evaluate(
                str(folder / name), DEV, str(SOURCE), ctx=CTX, tokens=TOKENS, progress=shown
            )
            rows.append({"method": name, **report.as_dict(), **score.as_dict()})
        show(rows)
        sample(folder / "rd")
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"rows": rows}))


def show(rows: list[dict]) -> None:
    first = rows[0]
    print(
        f"\n{SOURCE.name}: {first['expert_weights'] / 1e6:.1f} M expert weights, dev text, ", end=""
    )
    print(f"{first['tokens']} tokens, context {CTX}\n")
    print("| | bytes | bits per expert weight | ideal | perplexity | rise | KL | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    before = first["reference_perplexity"]
    print(f"| original, bf16 | {first['source_bytes']:,} | 16 | | {before:.2f} | | | |")
    for r in rows:
        rise = 100 * (r["perplexity"] / before - 1)
        print(
            f"| `{r['method']}` | {r['stored_bytes']:,} | {r['bits_per_weight']:.3f} "
            f"| {r['ideal_bits_per_weight']:.3f} | {r['perplexity']:.2f} | {rise:+.1f} % "
            f"| {r['kl']:.3f} | {r['seconds']:.0f} |"
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
