"""`qmoe sweep`: stored bits against quality, for rd at several rates and the other methods beside
it, as a table and a picture.

Knows nothing about how a point is measured; see `qmoe.measure.points`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qmoe.compression.rate import check_target
from qmoe.compression.settings import Settings
from qmoe.errors import QmoeError
from qmoe.measure.points import Points, Record
from qmoe.system.files import write_file, writing
from qmoe.system.text import markdown_table

TARGETS = (0.4, 0.6, 0.8, 1, 1.5, 2, 3)  # stored bits per expert weight
METHODS = ("rtn", "qmoe", "gptq2", "gptq3", "gptq4")
TABLE, PICTURE = "sweep.md", "sweep.png"
NO_MATPLOTLIB = (
    f"{PICTURE} was not drawn: matplotlib is missing; pip install matplotlib and run the same "
    "command again, nothing is measured twice"
)
_HEAD = (
    "point",
    "stored bits",
    "nominal bits",
    "whole model",
    "perplexity",
    "rise",
    "KL (nats)",
    "same top token",
    "seconds",
)


@dataclass(frozen=True)
class Sweep:
    """The result.

    Attributes:
        records: of the points, rd first, by target; see `Points.measure`.
        table: the Markdown table that was written.
        picture: where the picture is, None without matplotlib.
    """

    records: list[Record]
    table: str
    picture: Path | None

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `qmoe sweep`."""
        picture = None if self.picture is None else str(self.picture)
        return {"points": self.records, "picture": picture}

    def text(self) -> str:
        """The result for people."""
        return f"{self.table}\n{self.picture or NO_MATPLOTLIB}"


def parse_bits(text: str) -> list[float]:
    """Targets of ``--bits 0.4,0.8,2``, ascending, each once.

    Raises:
        QmoeError: not a list of numbers, or one that cannot be a target.
    """
    found = set()
    for part in text.split(","):
        try:
            bits = float(part)
        except ValueError:
            bits = math.nan
        if not math.isfinite(bits):
            raise QmoeError(f"--bits {text!r}: {part!r} is not a number; write 0.4,0.8,2") from None
        check_target(bits)
        found.add(bits)
    return sorted(found)


def parse_methods(text: str) -> list[str]:
    """Names of ``--methods rtn,gptq2``; the empty text is none.

    Raises:
        QmoeError: an unknown one.
    """
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in METHODS:
            raise QmoeError(f"--methods {text!r}: {name!r} is none of {', '.join(METHODS)}")
    return sorted(set(names), key=METHODS.index)


def sweep(
    points: Points,
    base: Settings,
    bits: Sequence[float] = TARGETS,
    methods: Sequence[str] = METHODS,
) -> Sweep:
    """Measures rd at every target and the other methods, and writes table and picture to
    `points.out`. A point that is known already is not run again.

    Args:
        points: measures.
        base: settings of all compressions; method and target are replaced.
        bits: targets of rd, see `parse_bits`.
        methods: the others, names of METHODS.

    Raises:
        QmoeError: the input's fault; what is measured so far stays.
    """
    wanted = [replace(base, method="rd", bits=b, delta=None) for b in bits]
    wanted += [replace(base, method=m, bits=None, delta=None) for m in methods]
    records = [points.measure(settings) for settings in wanted]
    text = table(records)
    write_file(points.out / TABLE, text.encode())
    picture: Path | None = points.out / PICTURE
    try:
        from qmoe.measure.plot import draw
    except ModuleNotFoundError as e:
        if e.name is None or e.name.partition(".")[0] != "matplotlib":
            raise
        picture = None
    if picture is not None:
        with writing(picture):
            draw(records, picture)
    return Sweep(records, text, picture)


def table(records: Sequence[Record]) -> str:
    """A Markdown table with a row for the original and one for every record."""
    first = records[0]
    title = (
        f"{first['model']}: {first['expert_weights'] / 1e6:.1f} M expert weights; {first['text']}, "
        f"{first['tokens']} scored tokens, context {first['ctx']}"
    )
    before = f"{first['reference_perplexity']:.3f}"
    original = ("original", "16", "", "16", before, "", "", "", "")
    return f"{title}\n\n{markdown_table(_HEAD, [original, *map(_row, records)])}\n"


def _row(r: Record) -> tuple[str, ...]:
    nominal, seconds = r["nominal_bits"], r["seconds"]
    return (
        r["point"],
        f"{r['bits_per_weight']:.3f}",
        "" if nominal is None else f"{nominal:.3f}",
        f"{r['model_bits_per_weight']:.3f}",
        f"{r['perplexity']:.3f}",
        f"{r['rise_percent']:+.2f} %",
        f"{r['kl']:.4f}",
        f"{100 * r['top1_agreement']:.1f} %",
        "" if seconds is None else f"{seconds:.0f}",
    )
