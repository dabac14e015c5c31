"""Writing one durable unit of a compressed checkpoint: dense tensors and encoded experts modules.

Knows nothing about the checkpoint around it, calibration or solvers.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from qmoe import codec
from qmoe.store.manifest import read_sealed, write_sealed
from qmoe.store.stored_dense import DenseGeometry, StoredMatrix
from qmoe.store.stored_experts import StoredExperts
from qmoe.system.files import writing
from qmoe.system.spill import Spill
from qmoe.types import ExpertsLayout


@dataclass(frozen=True)
class EncodedBatch:
    """Encoded matrices of one projection that share tables, and what is reported of them.

    Attributes:
        projection: its name.
        experts: one for each matrix.
        shape: (rows, cols) of every matrix.
        encoded: tables and streams.
        ideal_bits: of all matrices, scales included.
        zeros: integers that are zero.
    """

    projection: str
    experts: list[int]
    shape: tuple[int, int]
    encoded: codec.EncodedGroup
    ideal_bits: float
    zeros: int

    def save(self, path: Path) -> None:
        """Writes it for another process of the same run."""
        with writing(path):
            torch.save(asdict(self), path)

    @classmethod
    def load(cls, path: Path) -> "EncodedBatch":
        """Reads what `save` wrote."""
        plain = torch.load(path, weights_only=True)
        return cls(**plain | {"encoded": codec.EncodedGroup(**plain["encoded"])})


class ExpertsWriter:
    """Streams the matrices of one experts module into a block, a group at a time."""

    def __init__(self, spill: Spill, layout: ExpertsLayout) -> None:
        self._spill, self._layout = spill, layout
        self._names = [p.name for p in layout.projections]
        self._offsets = torch.full((layout.experts, len(self._names), 4), -1, dtype=torch.int64)
        self._totals = {name: {"bytes": 0, "ideal_bits": 0.0, "zeros": 0} for name in self._names}

    def add_batch(self, batch: EncodedBatch) -> None:
        """Appends encoded matrices; every expert is given once per projection.

        Raises:
            ValueError: wrong shapes or an expert that was given before.
            OutputError: the disk refuses.
        """
        j = self._names.index(batch.projection)
        want = self._layout.projections[j]
        for i, expert in enumerate(batch.experts):
            where = f"{self._layout.path} expert {expert} {batch.projection}"
            if batch.shape != (want.rows, want.cols):
                raise ValueError(f"{where}: {batch.shape}, expected {(want.rows, want.cols)}")
            if self._offsets[expert, j, 0] >= 0 or expert in batch.experts[:i]:
                raise ValueError(f"{where} is written twice")
        name = f"{self._layout.path}.stream"
        encoded, total = batch.encoded, self._totals[batch.projection]
        tables = self._spill.append(name, encoded.tables)
        total["bytes"] += encoded.tables.numel()
        for expert, blob in zip(batch.experts, encoded.matrices, strict=True):
            start = self._spill.append(name, blob)
            row = [tables, tables + encoded.tables.numel(), start, start + blob.numel()]
            self._offsets[expert, j] = torch.tensor(row)
            total["bytes"] += blob.numel()
        total["ideal_bits"] += batch.ideal_bits
        total["zeros"] += batch.zeros

    def finish(
        self, tokens: Sequence[int] | None = None, notes: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Completes the module.

        Args:
            tokens: calibration tokens per expert.
            notes: per expert, "" where nothing is to be said.

        Returns:
            The module's entry in the report of the manifest.

        Raises:
            ValueError: a matrix is missing.
        """
        if missing := (self._offsets[:, :, 0] < 0).nonzero().tolist():
            expert, j = missing[0]
            raise ValueError(f"{self._layout.path} expert {expert} {self._names[j]} is missing")
        self._spill.add(f"{self._layout.path}.offsets", self._offsets)
        projections = {}
        for p in self._layout.projections:
            weights = self._layout.experts * p.rows * p.cols
            total = self._totals[p.name]
            ideal = round(total["ideal_bits"], 3)
            projections[p.name] = {"weights": weights, **total, "ideal_bits": ideal}
        return {
            "tokens": None if tokens is None else [int(t) for t in tokens],
            "notes": None if notes is None else list(notes),
            "projections": projections,
        }


class BlockWriter:
    """One durable unit of a checkpoint: some tensors and experts modules, all or nothing.

    A context manager: leaving it normally makes the block durable, leaving it by an exception
    drops it.
    """

    def __init__(
        self,
        data: Path,
        journal: Path,
        name: str,
        max_shard_bytes: int,
        committed: Callable[[dict[str, Any]], object] = lambda record: None,
    ) -> None:
        """Args: folders of the shards and of the records; name of the block; bound of the data in
        one shard; receives the record of the block when it is durable.
        """
        self._data, self._journal, self.name = data, journal, name
        self._max, self._committed = max_shard_bytes, committed
        self._stem = record_path(journal, name).stem
        self._spill = Spill(journal / f"{self._stem}.spill")
        self._modules: dict[str, Any] = {}
        self._dense: dict[str, Any] = {}
        self._experts: dict[str, tuple[ExpertsLayout, ExpertsWriter]] = {}
        self.note: dict[str, Any] = {}  # JSON values that `finished_blocks` hands back later

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Stores a dense tensor under its module name.

        Raises:
            ValueError: the name is taken.
            OutputError: the disk refuses.
        """
        self._spill.add(name, tensor)

    def add_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """`add_tensor` for each of them, one alive at a time; none is held when this returns (the
        variable of a caller's own loop would hold the last one, which may be an embedding).
        """
        for name, tensor in tensors:
            self.add_tensor(name, tensor)
            del tensor  # before the next one is made

    def add_dense(
        self, geometry: DenseGeometry, bands: Iterable[Sequence[codec.EncodedGroup]], **report: Any
    ) -> dict[str, Any]:
        """Stores a dense matrix, a band at a time.

        Args:
            geometry: of the matrix.
            bands: for every band its planes, each encoded by itself.
            report: further JSON values for its entry of the report.

        Returns:
            The entry of the report in the manifest.

        Raises:
            ValueError: the name is taken, or bands or planes are not those of the geometry.
            OutputError: the disk refuses.
        """
        stream, offsets = geometry.tensors
        at = torch.empty(geometry.offsets_shape, dtype=torch.int64)
        size = 0
        for i, (_, planes) in enumerate(zip(geometry.bands, bands, strict=True)):
            if len(planes) != geometry.planes:
                raise ValueError(f"{geometry.name} band {i}: {len(planes)} planes, {geometry}")
            for j, encoded in enumerate(planes):
                blobs = (encoded.tables, *encoded.matrices)
                begin = [self._spill.append(stream, blob) for blob in blobs]
                ends = [b + blob.numel() for b, blob in zip(begin, blobs, strict=True)]
                at[i, j] = torch.tensor([begin[0], ends[0], begin[1], ends[1]])
                size = ends[1]
        self._spill.add(offsets, at)
        entry = {"weights": geometry.weights, "bytes": size + at.nbytes, **report}
        self._dense[geometry.name] = {"geometry": geometry.as_json(), "report": entry}
        return entry

    def add_dense_encoded(self, streams: StoredMatrix, report: dict[str, Any]) -> None:
        """Stores a dense matrix that is encoded already, with its entry of the report."""
        stream, offsets = streams.geometry.tensors
        self._spill.add(stream, streams.stream)
        self._spill.add(offsets, streams.offsets)
        entry = {"geometry": streams.geometry.as_json(), "report": report}
        self._dense[streams.geometry.name] = entry

    def experts(self, layout: ExpertsLayout) -> ExpertsWriter:
        """Begins an experts module; call `finish_experts` when all its groups are in."""
        writer = ExpertsWriter(self._spill, layout)
        self._experts[layout.path] = (layout, writer)
        return writer

    def finish_experts(
        self,
        path: str,
        tokens: Sequence[int] | None = None,
        notes: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Completes the experts module at `path`; see `ExpertsWriter.finish`."""
        layout, writer = self._experts.pop(path)
        report = writer.finish(tokens, notes)
        self._modules[path] = {"geometry": geometry(layout), "report": report}
        return report

    def add_encoded(self, streams: StoredExperts, report: dict[str, Any]) -> None:
        """Stores an experts module that is encoded already, with its entry of the report.

        Args:
            streams: validated.
            report: as `finish_experts` returned it.
        """
        path = streams.layout.path
        self._spill.add(f"{path}.stream", streams.stream)
        self._spill.add(f"{path}.offsets", streams.offsets)
        self._modules[path] = {"geometry": geometry(streams.layout), "report": report}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._spill.close()

    def _commit(self) -> None:
        if self._experts:
            raise ValueError(f"block {self.name}: experts {sorted(self._experts)} are not finished")
        files: dict[str, Any] = {}
        tensors: dict[str, Any] = {}
        shards = self._spill.shards(self._max)
        for i, names in enumerate(shards):
            part = f".{i + 1:03d}" if len(shards) > 1 else ""
            file = f"qmoe-{self._stem}{part}.safetensors"
            size, digest, sums = self._spill.write_shard(self._data / file, names)
            files[file] = {"bytes": size, "sha256": digest}
            tensors |= {n: {"file": file, "sha256": s} for n, s in sums.items()}
        record = {
            "name": self.name,
            "files": files,
            "tensors": tensors,
            "modules": self._modules,
            "dense": self._dense,
            "note": self.note,
        }
        write_sealed(record_path(self._journal, self.name), record)
        self._committed(read_sealed(record_path(self._journal, self.name)))


def record_path(journal: Path, name: str) -> Path:
    """Where the record of a block is kept."""
    return journal / (re.sub(r"[^A-Za-z0-9._-]", "_", name) + ".json")


def geometry(layout: ExpertsLayout) -> dict[str, Any]:
    """A layout as it stands in config.json."""
    return {
        "kind": layout.kind,
        "experts": layout.experts,
        "projections": [[p.name, p.rows, p.cols] for p in layout.projections],
    }
