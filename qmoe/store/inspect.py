"""``qmoe inspect``: sizes, bits and coverage of a compressed checkpoint. `inspect` decodes no
weights and hashes no file.

Bits per weight count everything that is stored for the experts: streams with their tables, scales,
classes and padding, the offsets, and the entries of both in the headers of their files.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Any

from qmoe import codec
from qmoe.store.coverage import coverage
from qmoe.store.manifest import MANIFEST
from qmoe.store.reader import Container
from qmoe.store.writer import INDEX
from qmoe.system.tensors import DTYPE_NAMES
from qmoe.system.text import size
from qmoe.types import QuantizedMatrix


@dataclass(frozen=True)
class Row:
    """One projection of one experts module.

    Attributes:
        module, projection: where.
        weights: number of weights.
        bits: stored bits per weight, tables included.
        ideal_bits: of a perfect coder, scales as stored.
        zeros: share of zero weights.
        tokens: calibration tokens (smallest, median, largest over the experts), None if not
            recorded.
        without_tokens: experts that saw none, None if not recorded.
        notes: experts about which something is noted.
    """

    module: str
    projection: str
    weights: int
    bits: float
    ideal_bits: float
    zeros: float
    tokens: tuple[int, int, int] | None
    without_tokens: int | None
    notes: int


@dataclass(frozen=True)
class Inspection:
    """What a compressed checkpoint holds, see `inspect`.

    Attributes:
        bits_per_weight: stored bits per expert weight.
        bits_as_read: of the experts that a token of the calibration text reads, on average; None if
            no tokens are recorded.
        below_floor: experts of less than 0.1 bit per weight, module -> numbers of its experts.
        below_floor_text: a line that names them; none if there are none.
        ideal_bits_per_weight: of a perfect coder, scales as stored.
        model_bits_per_weight: stored bits per weight of the whole model.
        zeros: share of zeros among expert weights.
        expert_weights, expert_bytes: of all experts.
        dense_weights: all others that the model takes.
        coded_dense_weights, coded_dense_bits_per_weight: those of them that ``--dense-bits`` coded;
            the bits are None if there are none.
        carried_weights: tensors that no module of the model takes.
        tensors: what became of the source's tensors, fate -> number, or None if not recorded.
        stored_bytes, source_bytes: of all files; the source's are None if not recorded.
        experts: number of experts.
        experts_without_tokens: those that calibration did not reach; experts_starved: those of few
            tokens; experts_scant: those of less than a tenth of an equal share. None if not
            recorded.
        format_version: of the container.
        model_type: transformers' name of the architecture.
        settings, versions: of the run that wrote it.
        layers: one row per projection of every experts module, in the order of the model.
    """

    bits_per_weight: float
    bits_as_read: float | None
    below_floor: Mapping[str, Sequence[int]]
    below_floor_text: tuple[str, ...]
    ideal_bits_per_weight: float
    model_bits_per_weight: float
    zeros: float
    expert_weights: int
    expert_bytes: int
    dense_weights: int
    coded_dense_weights: int
    coded_dense_bits_per_weight: float | None
    carried_weights: int
    tensors: Mapping[str, int] | None
    stored_bytes: int
    source_bytes: int | None
    experts: int
    experts_without_tokens: int | None
    experts_starved: int | None
    experts_scant: int | None
    format_version: int
    model_type: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    layers: tuple[Row, ...]

    def as_dict(self, layers: bool = False) -> dict[str, Any]:
        """The JSON of `qmoe inspect`; with `layers` the rows too."""
        left_out = ("layers", "below_floor_text")
        out = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        out["experts_below_floor"] = sum(len(experts) for experts in self.below_floor.values())
        return out | ({"layers": [vars(r) for r in self.layers]} if layers else {})

    def text(self, layers: bool = False) -> str:
        """The result for people; with `layers` a line for each projection."""
        lines = [
            f"{self.model_type}, {self.experts} experts, {self.expert_weights / 1e6:.1f} M expert "
            f"weights and {self.dense_weights / 1e6:.1f} M others",
            f"experts      {self.bits_per_weight:.3f} stored bits per weight "
            f"(ideal {self.ideal_bits_per_weight:.3f}, {100 * self.zeros:.1f} % zeros)",
        ]
        if self.bits_as_read is not None:
            lines.append(f"as read      {self.bits_as_read:.3f} bits, weighted by routing")
        if self.coded_dense_weights:
            lines.append(
                f"dense        {self.coded_dense_bits_per_weight:.3f} stored bits per weight "
                f"for {self.coded_dense_weights / 1e6:.1f} M of the others"
            )
        ratio = (self.source_bytes or 0) / self.stored_bytes
        lines += [
            f"whole model  {self.model_bits_per_weight:.3f} bits per weight",
            f"on disk      {size(self.stored_bytes)}, {ratio:.1f} times smaller than the source",
        ]
        if self.tensors:
            fates = ", ".join(f"{n} {fate}" for fate, n in self.tensors.items() if n)
            lines.append(f"tensors of the source: {fates}")
        if self.experts_without_tokens:
            lines.append(f"{self.experts_without_tokens} experts saw no calibration token")
        lines += self.below_floor_text
        return "\n".join(lines + (self._table() if layers else []))

    def _table(self) -> list[str]:
        lines = [f"{'module':40s} {'':8s} {'bits':>6s} {'ideal':>6s} {'zeros':>6s}  tokens"]
        for r in self.layers:
            low, middle, high = r.tokens or (0, 0, 0)
            lines.append(
                f"{r.module:40s} {r.projection:8s} {r.bits:6.3f} {r.ideal_bits:6.3f} "
                f"{100 * r.zeros:5.1f}%  {low} to {high}, median {middle}"
            )
        return lines


def inspect(directory: str | os.PathLike[str]) -> Inspection:
    """Sizes, bits and coverage of a compressed checkpoint.

    Args:
        directory: the checkpoint.

    Raises:
        CorruptError: manifest, headers or config are not sound.
        FormatVersionError: another format version.
    """
    container = Container.open(directory, check=False)
    modules = container.modules.values()
    expert_weights = sum(layout.weights for layout in modules)
    encoded = [f"{m.path}.{leaf}" for m in modules for leaf in ("stream", "offsets")]
    expert_bytes = sum(_stored(container, name) for name in encoded)
    coded = container.dense.values()
    coded_weights = sum(g.weights for g in coded)
    coded_bytes = sum(_stored(container, name) for g in coded for name in g.tensors)
    plain = [container.tensors[name][2] for name in container.dense_names()]
    dense_weights = coded_weights + sum(prod(entry.shape) for entry in plain)
    manifest = container.manifest
    carried = manifest["report"].get("carried_weights", 0)
    files = manifest["files"]
    weight_files = [n for n in files if n.endswith(".safetensors") or n == INDEX]
    weight_bytes = sum(files[name]["bytes"] for name in weight_files)
    found = rows(container)
    covered = coverage(container)
    return Inspection(
        bits_per_weight=8 * expert_bytes / expert_weights,
        bits_as_read=covered.bits_as_read,
        below_floor=covered.below_floor,
        below_floor_text=tuple(covered.floor_text()),
        ideal_bits_per_weight=sum(r.ideal_bits * r.weights for r in found) / expert_weights,
        model_bits_per_weight=8 * weight_bytes / (expert_weights + dense_weights + carried),
        zeros=sum(r.zeros * r.weights for r in found) / expert_weights,
        expert_weights=expert_weights,
        expert_bytes=expert_bytes,
        dense_weights=dense_weights,
        coded_dense_weights=coded_weights,
        coded_dense_bits_per_weight=8 * coded_bytes / coded_weights if coded_weights else None,
        carried_weights=carried,
        tensors=manifest["report"].get("tensors"),
        stored_bytes=sum(e["bytes"] for e in files.values())
        + (container.directory / MANIFEST).stat().st_size,
        source_bytes=manifest["source"].get("bytes"),
        experts=sum(layout.experts for layout in modules),
        experts_without_tokens=covered.without_tokens,
        experts_starved=covered.starved,
        experts_scant=covered.scant,
        format_version=manifest["format_version"],
        model_type=str(container.config.get("model_type")),
        settings=manifest["settings"],
        versions=manifest["versions"],
        layers=tuple(found),
    )


def rows(container: Container) -> list[Row]:
    """One row per projection of every experts module, in the order of the model."""
    reports = _reports(container)
    out = []
    for path, layout in container.modules.items():
        report = reports[path]
        tokens = report["tokens"]
        spread = None
        if tokens:
            ordered = sorted(tokens)
            spread = (ordered[0], ordered[len(ordered) // 2], ordered[-1])
        for p in layout.projections:
            entry = report["projections"][p.name]
            n = entry["weights"]
            out.append(
                Row(
                    module=path,
                    projection=p.name,
                    weights=n,
                    bits=8 * entry["bytes"] / n,
                    ideal_bits=entry["ideal_bits"] / n,
                    zeros=entry["zeros"] / n,
                    tokens=spread,
                    without_tokens=None if tokens is None else tokens.count(0),
                    notes=sum(bool(note) for note in report["notes"] or ()),
                )
            )
    return out


def typical_experts(directory: str | os.PathLike[str]) -> list[QuantizedMatrix]:
    """The integers of one projection of one layer, all experts: of the projection whose stored bits
    are nearest to the whole checkpoint's. Decodes these, nothing else.
    """
    container = Container.open(directory)
    found = rows(container)
    mean = sum(r.bits * r.weights for r in found) / sum(r.weights for r in found)
    row = min(found, key=lambda r: abs(r.bits - mean))
    streams = container.experts(row.module)
    names = [p.name for p in streams.layout.projections]
    j = names.index(row.projection)
    out = []
    for e in range(streams.layout.experts):
        tables = streams.tables(e, j)
        out.append(codec.decode_codes(tables, streams.matrix(e, j, tables)))
    return out


def _reports(container: Container) -> dict[str, Any]:
    found: dict[str, Any] = container.manifest["report"]["modules"]
    return found


def _stored(container: Container, name: str) -> int:
    """Bytes of a tensor and of its entry in the header."""
    entry = container.tensors[name][2]
    header = {
        "dtype": DTYPE_NAMES[entry.dtype],
        "shape": list(entry.shape),
        "data_offsets": [entry.begin, entry.end],
    }
    return entry.end - entry.begin + len(json.dumps({name: header}, separators=(",", ":"))) - 1
