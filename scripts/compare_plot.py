"""The picture of scripts/compare: KL against stored bits, readable on light and dark pages."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

INK = "#808890"  # as far from white as from the dark pages of code hosts
COLOURS = {
    "rd": "#2f81f7",
    "qmoe": "#d29922",
    "gptq": "#db6d28",
    "llama.cpp": "#3fb950",
    "hqq": "#bc6cd9",
}
MARKS = {"rd": "o", "qmoe": "s", "gptq": "D", "llama.cpp": "^", "hqq": "P"}
PLACES = {"gptq": (-6, 5), "hqq": (3, 6)}  # of a name, in points: so that none meets another
TICKS = (0.5, 0.65, 0.8, 1, 1.25, 1.6, 2, 2.5, 3, 4, 5, 6, 8)


def draw(points: Sequence[Any], path: Path) -> None:
    """Writes an SVG with a transparent ground.

    Args:
        points: `Point`s of scripts/compare.
        path: file to write.
    """
    look = {"svg.fonttype": "none", "svg.hashsalt": "qmoe", "font.family": "sans-serif"}
    with rc_context(look):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        figure.patch.set_alpha(0)
        left, right = figure.subplots(1, 2, sharey=True)
        _panel(left, [(p, p.bits) for p in points if p.whole is None], "stored bits, experts")
        whole = [(p, p.whole) for p in points if p.whole is not None]
        _panel(right, whole, "stored bits, whole file")
        left.set_ylabel("KL from the original, mean over the texts", color=INK)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})


def _panel(axes: Any, found: Sequence[tuple[Any, float]], label: str) -> None:
    axes.patch.set_alpha(0)
    for family, colour in COLOURS.items():
        own = sorted((bits, p.mean_kl, p.name) for p, bits in found if p.family == family)
        if not own:
            continue
        line = "-" if family == "rd" else "none"
        x, y, _ = zip(*own, strict=True)
        axes.plot(x, y, MARKS[family], linestyle=line, color=colour, markersize=7, label=family)
        for at, kl, name in own:
            if family != "rd":
                axes.annotate(
                    name, (at, kl), PLACES.get(family, (5, 4)), textcoords="offset points",
                    fontsize=8, color=colour, ha="right" if family == "gptq" else "left",
                )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(x=0.12)  # room for the last name
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.set_xlabel(label, color=INK)
    axes.tick_params(colors=INK, which="both")
    axes.grid(color=INK, alpha=0.25, linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_color(INK)
    if found:
        axes.legend(frameon=False, labelcolor=INK, fontsize=9)
