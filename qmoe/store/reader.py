"""Reading a compressed checkpoint without trust: manifest, checksums, headers, geometry; then
tensors one at a time.

Knows nothing about models, transformers or devices.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmoe.errors import CorruptError
from qmoe.store.claims import check_module
from qmoe.store.manifest import check_files, check_version, read_manifest
from qmoe.store.stored_dense import OFFSETS, STREAM, DenseGeometry, StoredMatrix, parse_dense
from qmoe.store.stored_experts import StoredExperts, check_offsets, used_runs
from qmoe.store.writer import CARRIED_BLOCK, INDEX
from qmoe.system.tensors import Entry, read_header, read_tensor
from qmoe.types import ExpertsLayout, ProjectionShape

MAX_WEIGHTS = 1 << 48  # far above any model; bounds products of sizes before they are used


def parse_geometry(path: str, raw: Any) -> ExpertsLayout:
    """One entry of ``quantization_config.modules``.

    Raises:
        CorruptError: with the module and the entry.
    """
    text = f"config.json: geometry of {path} is {raw!r}"[:500]
    try:
        kind, experts, projections = raw["kind"], raw["experts"], raw["projections"]
        rows = [(name, r, c) for name, r, c in projections]
    except (KeyError, TypeError, ValueError) as e:
        raise CorruptError(text) from e
    sizes = [experts, *(n for _, r, c in rows for n in (r, c))]
    names = [name for name, _, _ in rows]
    if (
        not kind
        or not isinstance(kind, str)
        or not rows
        or not all(isinstance(n, str) for n in names)
    ):
        raise CorruptError(text)
    if any(type(n) is not int or n < 1 for n in sizes) or len(set(names)) < len(names):
        raise CorruptError(text)
    parts = tuple(ProjectionShape(n, r, c, inner=n == "down") for n, r, c in rows)
    layout = ExpertsLayout(path, kind, experts, parts)
    if layout.weights > MAX_WEIGHTS:
        raise CorruptError(text)
    return layout


def parse_quantization(raw: Any) -> dict[str, ExpertsLayout]:
    """``quantization_config`` of config.json: the geometry of every experts module by path.

    Raises:
        CorruptError: not of this format.
        FormatVersionError: another format version.
    """
    if not isinstance(raw, dict) or raw.get("quant_method") != "qmoe":
        raise CorruptError("config.json: quantization_config.quant_method is not qmoe")
    check_version(raw.get("format_version"), "config.json")
    modules = raw.get("modules")
    if not isinstance(modules, dict) or not modules:
        raise CorruptError("config.json: quantization_config.modules lists no experts module")
    return {path: parse_geometry(path, entry) for path, entry in modules.items()}


@dataclass(frozen=True)
class Container:
    """An opened compressed checkpoint.

    Attributes:
        directory: where it is.
        manifest: verified against its own checksum.
        config: config.json.
        modules: geometry of the experts modules, by path in the transformers model.
        tensors: every stored tensor: (file name, offset of the file's data part, entry).
        carried: likewise the tensors that belong to no module, under their names in the source.
        dense: geometry of the dense matrices that are stored encoded, by parameter name.
    """

    directory: Path
    manifest: dict[str, Any]
    config: dict[str, Any]
    modules: dict[str, ExpertsLayout]
    tensors: dict[str, tuple[str, int, Entry]]
    carried: dict[str, tuple[str, int, Entry]]
    dense: dict[str, DenseGeometry] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        *,
        check: bool = True,
        progress: Callable[[int], object] | None = None,
    ) -> "Container":
        """Opens and validates; no tensor is read.

        Args:
            directory: a complete compressed checkpoint.
            check: compare the checksum of every file (reads all bytes once, several files at a
                time).
            progress: called with the size of every file that was found sound.

        Raises:
            CorruptError: anything that is not as it was written, with file, tensor and values.
            FormatVersionError: another format version.
        """
        where = Path(directory)
        manifest = read_manifest(where)
        if check:
            check_files(where, manifest, progress)
        config = _json_object(where / "config.json")
        quantization = config.get("quantization_config")
        modules = parse_quantization(quantization)
        dense = parse_dense((quantization or {}).get("dense"))
        tensors: dict[str, tuple[str, int, Entry]] = {}
        carried: dict[str, tuple[str, int, Entry]] = {}
        apart = manifest["blocks"].get(CARRIED_BLOCK, [])
        for file in sorted(manifest["files"]):
            if file.endswith(".safetensors"):
                start, entries = read_header(where / file)
                for name, entry in entries.items():
                    if other := tensors.get(name) or carried.get(name):
                        raise CorruptError(f"{where}: tensor {name} is in {other[0]} and {file}")
                    (carried if file in apart else tensors)[name] = (file, start, entry)
        self = cls(where, manifest, config, modules, tensors, carried, dense)
        self._check_index()
        self._check_modules()
        self._check_dense()
        return self

    def _check_index(self) -> None:
        found = {name: file for name, (file, _, _) in self.tensors.items()}
        apart = {name: file for name, (file, _, _) in self.carried.items()}
        listed = {name: entry["file"] for name, entry in self.manifest["tensors"].items()}
        index = _json_object(self.directory / INDEX).get("weight_map")
        for what, claim, true in (("the manifest", listed, found | apart), (INDEX, index, found)):
            if claim != true:
                known = claim if isinstance(claim, dict) else {}
                names = sorted(true.keys() | known.keys())
                differing = [n for n in names if true.get(n) != known.get(n)]
                raise CorruptError(
                    f"{self.directory}: {what} disagrees with the files about {differing[:3]}"
                )

    def _check_modules(self) -> None:
        for path, layout in self.modules.items():
            stream = self.tensors.get(f"{path}.stream")
            offsets = self.tensors.get(f"{path}.offsets")
            if stream is None or offsets is None:
                raise CorruptError(f"config.json lists {path}, which has no stored streams")
            want = (layout.experts, len(layout.projections), 4)
            _check_streams(path, stream[2], offsets[2], want)
            check_module(path, self.manifest["report"]["modules"].get(path), layout)
        for name in self.tensors:
            path, _, leaf = name.rpartition(".")
            if leaf in ("stream", "offsets") and path not in self.modules:
                raise CorruptError(f"{name} is stored, but config.json does not list {path}")

    def _check_dense(self) -> None:
        for name, geometry in self.dense.items():
            stream, offsets = (self.tensors.get(t) for t in geometry.tensors)
            if stream is None or offsets is None or name in self.tensors:
                raise CorruptError(f"config.json lists {name}, which is not stored encoded once")
            _check_streams(name, stream[2], offsets[2], geometry.offsets_shape)
        for tensor in self.tensors:
            name, _, leaf = tensor.rpartition(".")
            if leaf in (STREAM, OFFSETS) and name not in self.dense:
                raise CorruptError(f"{tensor} is stored, but config.json does not list {name}")

    def read(self, name: str) -> Tensor:
        """One stored tensor, in memory of its own.

        Raises:
            CorruptError: it is not stored, or its file is shorter than its header says.
        """
        place = self.tensors.get(name) or self.carried.get(name)
        if place is None:
            raise CorruptError(f"{self.directory} holds no tensor {name}")
        file, start, entry = place
        return read_tensor(self.directory / file, start, entry)

    def experts(self, path: str) -> StoredExperts:
        """The encoded matrices of one experts module.

        Raises:
            CorruptError: its offsets are not valid.
        """
        layout = self.modules[path]
        return StoredExperts(layout, self.read(f"{path}.stream"), self.read(f"{path}.offsets"))

    def some_experts(self, path: str, own: Sequence[int]) -> StoredExperts:
        """Some of a module's experts, renumbered from 0 in the order given; only the bytes that
        they use are read.

        Args:
            path: of the experts module.
            own: indices of at least one expert.

        Raises:
            CorruptError: its offsets are not valid.
        """
        layout, offsets = self.modules[path], self.read(f"{path}.offsets")
        file, start, entry = self.tensors[f"{path}.stream"]
        check_offsets(layout, offsets, entry.shape[0])
        runs, moved = used_runs(offsets[list(own)])
        stream = torch.empty(sum(b - a for a, b in runs), dtype=torch.uint8)
        at = 0
        for a, b in runs:
            run = Entry(torch.uint8, (b - a,), entry.begin + a, entry.begin + b)
            stream[at : at + b - a] = read_tensor(self.directory / file, start, run)
            at += b - a
        return StoredExperts(replace(layout, experts=len(own)), stream, moved)

    def dense_matrix(self, name: str) -> StoredMatrix:
        """The encoded form of one dense matrix.

        Raises:
            CorruptError: its offsets are not valid.
        """
        geometry = self.dense[name]
        stream, offsets = geometry.tensors
        return StoredMatrix(geometry, self.read(stream), self.read(offsets))

    def dense_names(self) -> list[str]:
        """Names of the stored tensors that are not part of anything encoded."""
        encoded = {f"{path}.{leaf}" for path in self.modules for leaf in ("stream", "offsets")}
        encoded.update(tensor for geometry in self.dense.values() for tensor in geometry.tensors)
        return [name for name in self.tensors if name not in encoded]


def _check_streams(name: str, stream: Entry, offsets: Entry, want: tuple[int, ...]) -> None:
    """Compares types and shapes of the two tensors of something encoded."""
    good = stream.dtype == torch.uint8 and len(stream.shape) == 1
    if not good or offsets.dtype != torch.int64 or offsets.shape != want:
        raise CorruptError(
            f"{name}: stream {stream.dtype} {stream.shape}, offsets {offsets.dtype} "
            f"{offsets.shape}; config.json asks for uint8 [n] and int64 {want}"
        )


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as e:
        raise CorruptError(f"cannot read {path}: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:  # a number of thousands of digits is a ValueError
        raise CorruptError(f"{path} is not JSON: {e}") from e
    if not isinstance(value, dict):
        raise CorruptError(f"{path} is a {type(value).__name__}, not an object")
    return value
