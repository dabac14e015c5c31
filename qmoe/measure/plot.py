"""The picture of a sweep. Importing this module needs matplotlib; nothing else in the package does.

Knows nothing about how points are measured.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from qmoe.measure.points import Record

_PANELS = (
    ("rise_percent", "perplexity rise over the original, %", 1.0),
    ("kl", "KL from the original, nats per token", 0.01),
)
_MARKERS = {"rtn": "v", "qmoe": "s", "gptq2": "D", "gptq3": "P", "gptq4": "X"}
_X_TICKS = (0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
_DECADES = tuple(m * 10.0**k for k in range(-4, 7) for m in (1, 3))


def draw(records: Sequence[Record], path: Path) -> None:
    """Stored bits of the experts against perplexity and KL.

    The vertical axes are logarithmic, and linear near the original, which lies at zero.

    Args:
        records: see `qmoe.measure.points.Points.measure`; those of rd are joined by a line.
        path: PNG to write.
    """
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes, (key, label, linear) in zip(panels, _PANELS, strict=True):
        _panel(axes, records, key, label, linear)
    panels[0].legend(fontsize=11)
    first = records[0]
    figure.suptitle(
        f"{first['model']}, {first['text']}, context {first['ctx']}: "
        f"perplexity of the original {first['reference_perplexity']:.2f}",
        fontsize=13,
    )
    canvas.print_png(path)


def _panel(axes: Axes, records: Sequence[Record], key: str, label: str, linear: float) -> None:
    ours = sorted(
        (r for r in records if r["settings"]["method"] == "rd"), key=lambda r: r["bits_per_weight"]
    )
    axes.axhline(0.0, color="black", linestyle="--", linewidth=1.2, label="original, 16 bits")
    axes.plot(
        [r["bits_per_weight"] for r in ours],
        [r[key] for r in ours],
        "o-",
        color="tab:blue",
        linewidth=2,
        label="rd",
    )
    for i, r in enumerate(r for r in records if r not in ours):
        name = r["settings"]["method"]
        axes.plot(
            [r["bits_per_weight"]],
            [r[key]],
            _MARKERS.get(name, "*"),
            color=f"C{i + 1}",
            markersize=9,
            label=name,
        )
    bits = [r["bits_per_weight"] for r in records]
    axes.set_xscale("log")
    axes.set_xlim(min(bits) / 1.12, max(bits) * 1.12)
    axes.xaxis.set_major_locator(FixedLocator(_spread(_X_TICKS, *axes.get_xlim(), 12)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    values = [r[key] for r in records]
    low, high = min(0.0, *values), max(linear, *values)
    axes.set_yscale("symlog", linthresh=linear, linscale=0.6)
    axes.set_ylim(1.3 * low - 0.1 * linear, 1.4 * high)
    ticks = [t for t in _DECADES if linear / 3.5 < t < 1.4 * high]
    below = [-t for t in ticks if -t > axes.get_ylim()[0]]
    axes.yaxis.set_major_locator(FixedLocator([*below, 0.0, *ticks]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("stored bits per expert weight", fontsize=12)
    axes.set_ylabel(label, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(True, color="0.9")


def _spread(ticks: Sequence[float], low: float, high: float, most: int) -> list[float]:
    """At most `most` of the ticks within the limits, none closer than labels need."""
    room = math.log(high / low) / most
    kept: list[float] = []
    for tick in ticks:
        if low <= tick <= high and (not kept or math.log(tick / kept[-1]) >= room):
            kept.append(tick)
    return kept
