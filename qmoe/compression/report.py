"""What `qmoe compress` says at the end: size, time, memory and which experts were starved."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmoe.store.inspect import FEW_TOKENS, NEARLY_ERASED, inspect
from qmoe.store.manifest import read_manifest

_SIZES = (
    "bits_per_weight",
    "bits_as_read",
    "experts_nearly_erased",
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
    sizes: dict[str, Any]
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
            "notes": self.notes,
            **{k: self.sizes[k] for k in _SIZES},
        }

    def text(self) -> str:
        """The result for people."""
        s = self.sizes
        lines = [
            f"{self.out}: {s['stored_bytes'] / 2**20:.2f} MiB "
            f"from {s['source_bytes'] / 2**20:.2f} MiB",
            f"experts {s['bits_per_weight']:.3f} stored bits per weight "
            f"(ideal {s['ideal_bits_per_weight']:.3f}), "
            f"whole model {s['model_bits_per_weight']:.3f}",
            *_read_line(s),
            f"{self.seconds:.0f} s, peak memory {self.peak_rss_bytes / 2**20:.0f} MiB",
            f"coverage: {self.experts} experts, {self.without_tokens} saw no token, "
            f"{self.starved} fewer than {FEW_TOKENS}",
        ]
        lines += [f"  {count} experts: {note}" for note, count in sorted(self.notes.items())]
        return "\n".join(lines)


def _read_line(found: dict[str, Any]) -> list[str]:
    """What a token reads, and how many experts are nearly gone."""
    out = []
    if found["bits_as_read"] is not None:
        out.append(f"as read      {found['bits_as_read']:.3f} bits per weight, weighted by routing")
    if found["experts_nearly_erased"]:
        out.append(
            f"{found['experts_nearly_erased']} of {found['experts']} experts have less than "
            f"{NEARLY_ERASED:g} bit per weight: the calibration text hardly used them"
        )
    return out


def _dense_line(found: dict[str, Any]) -> list[str]:
    """What `--dense-bits` came to; nothing if it was not used."""
    if not found["coded_dense_weights"]:
        return []
    return [
        f"dense        {found['coded_dense_bits_per_weight']:.3f} stored bits per weight "
        f"for {found['coded_dense_weights'] / 1e6:.1f} M of the others"
    ]


def inspect_text(found: dict[str, Any]) -> str:
    """The result of `qmoe inspect` for people; with "layers" in it, a row for each projection."""
    ratio = (found["source_bytes"] or 0) / found["stored_bytes"]
    lines = [
        f"{found['model_type']}, {found['experts']} experts, "
        f"{found['expert_weights'] / 1e6:.1f} M expert weights "
        f"and {found['dense_weights'] / 1e6:.1f} M others",
        f"experts      {found['bits_per_weight']:.3f} stored bits per weight "
        f"(ideal {found['ideal_bits_per_weight']:.3f}, {100 * found['zeros']:.1f} % zeros)",
        *_read_line(found),
        *_dense_line(found),
        f"whole model  {found['model_bits_per_weight']:.3f} bits per weight",
        f"on disk      {found['stored_bytes'] / 2**20:.2f} MiB, {ratio:.1f} times smaller "
        "than the source",
    ]
    if found["tensors"]:
        fates = ", ".join(f"{n} {fate}" for fate, n in found["tensors"].items() if n)
        lines.append(f"tensors of the source: {fates}")
    if found["experts_without_tokens"]:
        lines.append(f"{found['experts_without_tokens']} experts saw no calibration token")
    if "layers" in found:
        lines.append(f"{'module':40s} {'':8s} {'bits':>6s} {'ideal':>6s} {'zeros':>6s}  tokens")
        for r in found["layers"]:
            low, middle, high = r["tokens"] or (0, 0, 0)
            lines.append(
                f"{r['module']:40s} {r['projection']:8s} {r['bits']:6.3f} {r['ideal_bits']:6.3f} "
                f"{100 * r['zeros']:5.1f}%  {low} to {high}, median {middle}"
            )
    return "\n".join(lines)
