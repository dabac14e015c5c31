"""Measured points of one model: compress, evaluate against the source, remember. What has been
measured with the same settings is never run again.

Every point is one line of OUT/points.jsonl. Its key is a hash of the settings, the source, the
texts, the device and the release, so that points of different runs live together in one file.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmoe import codec
from qmoe.calib import default_text
from qmoe.compression.pipeline import compress
from qmoe.compression.settings import Settings
from qmoe.errors import CorruptError
from qmoe.measure.dictionary import dictionary_bits
from qmoe.measure.score import evaluate
from qmoe.source.checkpoint import open_checkpoint
from qmoe.store.inspect import inspect
from qmoe.store.manifest import MANIFEST
from qmoe.store.reader import Container
from qmoe.system.files import canonical_json, file_sha256, write_file, writing
from qmoe.system.machine import pick_device
from qmoe.version import __version__

POINTS = "points.jsonl"
TERNARY = ("rtn", "qmoe")
_SIZES = (
    "bits_per_weight",
    "ideal_bits_per_weight",
    "model_bits_per_weight",
    "expert_weights",
    "expert_bytes",
    "stored_bytes",
    "source_bytes",
    "model_type",
)
Record = dict[str, Any]


@dataclass(frozen=True)
class Points:
    """Measures points of a model.

    Attributes:
        source: directory or hub id.
        out: folder of the records and of the compressed checkpoints while they are needed.
        text: evaluation text.
        tokens: at most this many tokens of it, None for all.
        ctx: tokens of a window of the evaluation.
        keep: compressed checkpoints stay in `out`.
        progress: draw bars.
        say: receives what is going on.
    """

    source: str
    out: Path
    text: str
    tokens: int | None = None
    ctx: int = 1024
    keep: bool = False
    progress: bool = False
    say: Callable[[str], object] = lambda text: None

    def measure(self, settings: Settings) -> Record:
        """The record of one point, from the file if it is there, else compressed and evaluated.

        Args:
            settings: of the compression.

        Returns:
            "point" (its name), "settings", sizes as `qmoe inspect` says them, the score as `qmoe
            eval` says it, "rise_percent" of the perplexity over the source's, "nominal_bits" (see
            `nominal_bits`), "seconds" of the compression (None if it was found done).

        Raises:
            QmoeError: whatever `compress` and `evaluate` say.
        """
        name, key = point_name(settings), self._key(settings)
        known = self.records().get(key)
        if known is not None:
            self.say(f"{name}: known")
            return known
        with writing(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        directory = self.out / f"{name}-{key[:8]}"
        seconds = None
        if not (directory / MANIFEST).exists():
            self.say(f"{name}: compressing")
            seconds = compress(self.source, directory, settings, self.progress).seconds
        self.say(f"{name}: evaluating")
        score = evaluate(
            str(directory),
            self.text,
            self.source,
            ctx=self.ctx,
            tokens=self.tokens,
            device=settings.device,
            progress=self.progress,
        ).as_dict()
        found = inspect(directory)
        record = {
            "point": name,
            "key": key,
            "model": Path(self.source).name,
            "settings": settings.recorded(),
            "ctx": self.ctx,
            "text": Path(self.text).name,
            "seconds": seconds,
            **{k: getattr(found, k) for k in _SIZES},
            "nominal_bits": nominal_bits(directory, settings.method),
            **score,
            "rise_percent": 100 * (score["perplexity"] / score["reference_perplexity"] - 1),
        }
        self._append(record)
        if not self.keep:
            with writing(directory):
                shutil.rmtree(directory)
        return record

    def records(self) -> dict[str, Record]:
        """All points of `out`, by key.

        Raises:
            CorruptError: a line is no record.
        """
        path = self.out / POINTS
        if not path.exists():
            return {}
        found = {}
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            try:
                record = json.loads(line)
                found[record["key"]] = record
            except (ValueError, TypeError, KeyError) as e:
                raise CorruptError(f"{path}: line {number} is no record; remove it") from e
        return found

    def _append(self, record: Record) -> None:
        """Adds one line; the file is complete at every moment, also with several writers."""
        path = self.out / POINTS
        with writing(path), open(path.with_name(POINTS + ".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = path.read_bytes() if path.exists() else b""
            line = json.dumps(record, sort_keys=True, allow_nan=False) + "\n"
            write_file(path, before + line.encode("ascii"))

    def _key(self, settings: Settings) -> str:
        job = {
            **settings.recorded(),
            "calib": default_text.sha256() if settings.calib is None else _content(settings.calib),
            "source": open_checkpoint(self.source).fingerprint(),
            "text": _content(self.text),
            "eval": [self.tokens, self.ctx],
            "device": pick_device(settings.device).type,
            "version": __version__,
        }
        return hashlib.sha256(canonical_json(job)).hexdigest()


def point_name(settings: Settings) -> str:
    """A name for people: method, target and what is unusual, such as ``rd-0.8-drift=0``."""
    parts = [settings.method]
    if settings.target is not None:
        parts.append(f"{settings.target:.6g}")
    if settings.delta is not None:
        parts.append(f"delta={settings.delta:.6g}")
    if settings.dense_bits < 16:
        parts.append(f"dense={settings.dense_bits:g}")
    if settings.model_bits is not None:
        parts.append(f"model={settings.model_bits:g}")
    parts += [f"{k}={v:g}" for k, v in sorted(settings.solver_options.items())]
    return "-".join(parts)


def nominal_bits(directory: str | os.PathLike[str], method: str) -> float | None:
    """Bits per expert weight of a compressed checkpoint in the format that its method comes with.

    gptqN: N bits a weight and 32 a row (a scale and a zero point of 16 bits), no entropy coding:
    ``N + 32 / cols``. rtn and qmoe: QMoE's 16-bit dictionary and 64 bits a row, counted on the
    integers that are stored. rd: None, it has no other format.
    """
    container = Container.open(directory, check=False)
    weights = sum(layout.weights for layout in container.modules.values())
    if method.startswith("gptq"):
        rows = sum(
            layout.experts * p.rows
            for layout in container.modules.values()
            for p in layout.projections
        )
        return int(method.removeprefix("gptq")) + 32 * rows / weights
    if method not in TERNARY:
        return None
    bits = 0
    for path, layout in container.modules.items():
        stream = container.experts(path)
        for j in range(len(layout.projections)):
            for e in range(layout.experts):
                tables = stream.tables(e, j)
                bits += dictionary_bits([codec.decode_codes(tables, stream.matrix(e, j, tables))])
    return bits / weights


def _content(text: str) -> str:
    """What identifies a text: its bytes if it is a file, else the name of a data set."""
    return file_sha256(Path(text)) if Path(text).is_file() else text
