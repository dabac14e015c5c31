"""What `qmoe compress` says at the end: size, time, memory and which experts were starved."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmoe.compression.settings import Settings
from qmoe.store.coverage import FEW_TOKENS, SCANT
from qmoe.store.inspect import Inspection, inspect
from qmoe.store.manifest import read_manifest
from qmoe.system.text import size

_SIZES = (
    "bits_per_weight",
    "bits_as_read",
    "ideal_bits_per_weight",
    "model_bits_per_weight",
    "expert_weights",
    "stored_bytes",
    "source_bytes",
    "tensors",
)


@dataclass(frozen=True)
class CompressReport:
    """The result of a compression.

    Attributes:
        out: the directory written.
        seconds: wall time.
        peak_rss_bytes: peak resident memory of this process.
        sizes: what `qmoe inspect` says.
        experts: number of experts in the model.
        without_tokens: experts that no calibration token reached.
        starved: experts with fewer than FEW_TOKENS tokens, those without any not counted.
        notes: what was done about unusual experts: text -> how many experts.
    """

    out: Path
    seconds: float
    peak_rss_bytes: int
    sizes: Inspection
    experts: int
    without_tokens: int
    starved: int
    notes: dict[str, int]

    @classmethod
    def of(cls, out: Path, seconds: float, peak: int) -> "CompressReport":
        """Reads the report of a finished run from what it wrote."""
        notes: dict[str, int] = {}
        tokens: list[int] = []
        for module in read_manifest(out)["report"]["modules"].values():
            tokens += module["tokens"] or []
            for note in filter(None, module["notes"] or []):
                notes[note] = notes.get(note, 0) + 1
        starved = sum(0 < n < FEW_TOKENS for n in tokens)
        return cls(out, seconds, peak, inspect(out), len(tokens), tokens.count(0), starved, notes)

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `qmoe compress`."""
        return {
            "out": str(self.out),
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "experts": self.experts,
            "experts_without_tokens": self.without_tokens,
            "experts_starved": self.starved,
            "experts_scant": self.sizes.experts_scant,
            "experts_below_floor": sum(len(e) for e in self.sizes.below_floor.values()),
            "below_floor": self.sizes.below_floor,
            "notes": self.notes,
            **{k: getattr(self.sizes, k) for k in _SIZES},
        }

    def text(self) -> str:
        """The result for people."""
        s = self.sizes
        lines = [
            f"{self.out}: {size(s.stored_bytes)} from {size(s.source_bytes or 0)}",
            f"experts {s.bits_per_weight:.3f} stored bits per weight "
            f"(ideal {s.ideal_bits_per_weight:.3f}), "
            f"as read {s.bits_as_read or 0:.3f}, whole model {s.model_bits_per_weight:.3f}",
            f"{self.seconds:.0f} s, peak memory {size(self.peak_rss_bytes)}",
            f"coverage: {self.experts} experts, {self.without_tokens} saw no token, "
            f"{self.starved} fewer than {FEW_TOKENS} of the text",
            *s.below_floor_text,
        ]
        lines += [f"  {count} experts: {note}" for note, count in sorted(self.notes.items())]
        return "\n".join(lines)


_NARROW = 0.05  # share of scantily reached experts from which on a text is called too narrow
_SUPPORTED = 2.0  # bits per weight from which on a narrow text alone is bearable


def advice(settings: Settings, sizes: Inspection) -> str:
    """What to say of a text that reaches too few experts; else nothing."""
    scant = sizes.experts_scant or 0
    if scant <= _NARROW * sizes.experts:
        return ""
    said = (
        f"{scant} of {sizes.experts} experts got less than {SCANT:g} of an equal share of the "
        "text's tokens"
    )
    if settings.method == "rd" and settings.unseen > 0:
        return f"{said}; how they are used is known from the model's own words (--unseen) alone"
    low = sizes.bits_per_weight < _SUPPORTED
    harm = f", and {sizes.bits_per_weight:.2g} bits are too few for that" if low else ""
    return (
        f"{said}: text of other kinds than the calibration text will suffer{harm}; use a more "
        "varied --calib, --method rd with --unseen, or more --bits"
    )
