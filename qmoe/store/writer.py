"""Writing a compressed checkpoint: a directory that appears complete or not at all.

While it grows, everything lies in ``OUT.partial``: finished shards under ``data``, their records
under ``journal``. A block of the model is durable once its record is written; after a crash the
same job goes on at the first block without a record. When all is there, ``data`` is renamed to
``OUT``. No file holds a time, a host name or a path, so equal inputs give equal bytes.

``docs/format.md`` specifies the result. Knows nothing about calibration, solvers or models beyond
the names of tensors.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from qmoe.errors import CorruptError, OutputError
from qmoe.store.block import BlockWriter, record_path
from qmoe.store.manifest import FORMAT_VERSION, MANIFEST, read_sealed, write_sealed
from qmoe.system.files import canonical_json, file_sha256, sync_directory, write_file, writing

INDEX = "qmoe.safetensors.index.json"
MAX_SHARD_BYTES = 4 << 30
CARRIED_BLOCK = "carried tensors"  # no module path has a space
# What a user of the model needs besides its weights; a licence must travel with what it covers.
CARRIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
)


class ContainerWriter:
    """Builds ``out_dir``. A context manager that holds a lock; what is finished stays for `resume`
    unless discarded.

    Typical use::

        with ContainerWriter(out, job=settings, resume=True) as writer:
            for name in blocks:
                if name in writer.finished_blocks():
                    continue
                with writer.block(name) as block:
                    block.add_tensor(...)
                    experts = block.experts(layout)
                    experts.add_batch(batch)
                    block.finish_experts(layout.path, tokens, notes)
            writer.finish(blocks, config=..., settings=..., versions=..., source=...,
            carry_from=...)
    """

    def __init__(
        self,
        out_dir: str | os.PathLike[str],
        *,
        job: Mapping[str, Any] | None = None,
        resume: bool = False,
        replace: bool = False,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Opens or resumes the work on an output directory.

        Args:
            out_dir: must not exist, or be empty.
            job: JSON values that the bytes depend on (settings, identity of the source). A restart
                must have the same.
            resume: go on with what an earlier run of the same job left; otherwise start over.
            replace: allow `out_dir` to exist: its files of the same names are replaced, the
                manifest last.
            max_shard_bytes: bound of the data in one file, unless a single tensor is larger.

        Raises:
            OutputError: the directory exists, is in use, cannot be written, or belongs to another
                job.
        """
        self.out = Path(os.path.abspath(out_dir))
        self._replace, self._max = replace, max_shard_bytes
        self._root = _partial(self.out)
        self._data, self._journal = self._root / "data", self._root / "journal"
        self.work = self._root / "work"  # for files of the run that do not become part of `out`
        self._check_free()
        with writing(self._root):
            self._root.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        try:
            if not resume:
                for folder in (self._data, self._journal, self.work, downloads_of(self.out)):
                    shutil.rmtree(folder, ignore_errors=True)
            with writing(self._root):
                self._data.mkdir(exist_ok=True)
                self._journal.mkdir(exist_ok=True)
                self.work.mkdir(exist_ok=True)
                sync_directory(self._root)
                sync_directory(self._root.parent)
            self._settle_job(dict(job or {}))
        except BaseException:
            os.close(self._lock)
            raise
        self._records: dict[str, dict[str, Any]] | None = None

    def _check_free(self) -> None:
        if self._replace or not os.path.lexists(self.out):
            return
        if not self.out.is_dir() or any(self.out.iterdir()):
            raise OutputError(
                f"{self.out} already exists; choose another output directory or remove it"
            )

    def _take_lock(self) -> int:
        path = self._root / "lock"
        with writing(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(fd)
            raise OutputError(f"another run is writing {self.out}; wait for it or stop it") from e
        self._check_free()  # the run that held the lock may have finished meanwhile
        return fd

    def _settle_job(self, job: dict[str, Any]) -> None:
        path = self._journal / "job.json"
        if not path.exists():
            write_sealed(path, {"job": job})
            return
        before = read_sealed(path)["job"]
        now = json.loads(canonical_json(job))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                raise OutputError(
                    f"{self._root} was begun with {key} = {before.get(key)!r}, this run has "
                    f"{now.get(key)!r}; repeat the old command or start over with --fresh"
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the lock. What is finished stays and can be resumed."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def discard(self) -> None:
        """Removes everything that was written so far and releases the lock."""
        self.close()
        shutil.rmtree(self._root, ignore_errors=True)

    def finished_blocks(self) -> dict[str, dict[str, Any]]:
        """Blocks that are durable and whole: {name: the `note` of its writer}. Every file is
        compared with its checksum.

        A block with a damaged record or shard is not finished; it is written again.
        """
        if self._records is None:
            self._records = {}
            for path in sorted(self._journal.glob("*.json")):
                record = self._sound_record(path)
                if record is not None:
                    self._records[record["name"]] = record
        return {name: record["note"] for name, record in self._records.items()}

    def _sound_record(self, path: Path) -> dict[str, Any] | None:
        if path.name == "job.json":
            return None
        try:
            record = read_sealed(path)
            for file, entry in record["files"].items():
                if file_sha256(self._data / file) != entry["sha256"]:
                    return None
        except (CorruptError, OSError):
            return None
        return record

    def recorded(self, name: str) -> bool:
        """Whether a block has a record; cheap, and its files are not looked at."""
        return record_path(self._journal, name).exists()

    def block(self, name: str) -> BlockWriter:
        """Begins a block. One at a time; a block of the same name is replaced."""
        self._records = None
        return BlockWriter(self._data, self._journal, name, self._max)

    def finish(
        self,
        blocks: Sequence[str],
        *,
        config: Mapping[str, Any],
        settings: Mapping[str, Any],
        versions: Mapping[str, str],
        source: Mapping[str, Any],
        report: Mapping[str, Any] | None = None,
        carry_from: str | os.PathLike[str] | None = None,
        extra_files: Mapping[str, bytes] | None = None,
    ) -> Path:
        """Completes the checkpoint and makes it visible under its name.

        Args:
            blocks: all blocks, in the order of the model.
            config: the model's config.json as JSON values; `quantization_config` is filled in.
            settings: how it was compressed.
            versions: of the libraries that took part.
            source: what was compressed, e.g. {"name": ..., "bytes": ...}.
            report: more entries for the manifest's report, beside "modules" and "dense".
            carry_from: directory whose tokenizer, generation and licence files are copied.
            extra_files: more small files by name.

        Returns:
            The output directory.

        Raises:
            ValueError: a block is not finished, or two blocks hold the same tensor.
            OutputError: the disk refuses, or the directory appeared meanwhile.
        """
        self.finished_blocks()
        records = self._records or {}
        if missing := [name for name in blocks if name not in records]:
            raise ValueError(f"blocks {missing} are not finished")
        files: dict[str, Any] = {}
        tensors: dict[str, Any] = {}
        modules: dict[str, Any] = {}
        dense: dict[str, Any] = {}
        for name in blocks:
            if twice := tensors.keys() & records[name]["tensors"].keys():
                raise ValueError(f"block {name}: {sorted(twice)[:3]} are in another block, too")
            files |= records[name]["files"]
            tensors |= records[name]["tensors"]
            modules |= records[name]["modules"]
            dense |= records[name]["dense"]
        for stale in self._data.iterdir():  # shards of blocks that are not part of the model
            if stale.name not in files:
                stale.unlink()
        small: dict[str, bytes] = {}
        if carry_from is not None:  # a model with code of its own is nothing without it
            code = ("*.py",) if config.get("auto_map") else ()
            small = carried_files(carry_from, code)
        small |= extra_files or {}
        small["config.json"] = canonical_json(_with_modules(config, modules, dense))
        total = sum(entry["bytes"] for entry in files.values())
        small[INDEX] = canonical_json(
            {
                "metadata": {"total_size": total},
                "weight_map": {
                    name: entry["file"]
                    for block in blocks
                    if block != CARRIED_BLOCK  # transformers must not look for their modules
                    for name, entry in records[block]["tensors"].items()
                },
            }
        )
        for name, data in sorted(small.items()):
            write_file(self._data / name, data)
            files[name] = {"bytes": len(data), "sha256": file_sha256(self._data / name)}
        manifest = {
            "format_version": FORMAT_VERSION,
            "files": files,
            "tensors": tensors,
            "blocks": {name: sorted(records[name]["files"]) for name in blocks},
            "settings": dict(settings),
            "versions": dict(versions),
            "source": dict(source),
            "report": {
                **(report or {}),
                "modules": {path: entry["report"] for path, entry in modules.items()},
                "dense": {name: entry["report"] for name, entry in dense.items()},
            },
        }
        write_sealed(self._data / MANIFEST, manifest)
        self._publish()
        return self.out

    def _publish(self) -> None:
        self._check_free()
        with writing(self.out):
            if self._replace and self.out.is_dir() and any(self.out.iterdir()):
                (self.out / MANIFEST).unlink(missing_ok=True)  # never the old one beside new files
                for old in self.out.glob("qmoe-*.safetensors"):
                    old.unlink()
                names = sorted(p.name for p in self._data.iterdir() if p.name != MANIFEST)
                for name in [*names, MANIFEST]:
                    os.replace(self._data / name, self.out / name)
                sync_directory(self.out)
            else:
                os.rename(self._data, self.out)
            sync_directory(self.out.parent)
        self.discard()


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def downloads_of(out: str | os.PathLike[str]) -> Path:
    """Where a run that writes `out` may put files of its source; gone when `out` is complete."""
    return _partial(Path(os.path.abspath(out))) / "source"


def _with_modules(
    config: Mapping[str, Any], modules: Mapping[str, Any], dense: Mapping[str, Any]
) -> dict[str, Any]:
    quantization = {
        "quant_method": "qmoe",
        "format_version": FORMAT_VERSION,
        "modules": {path: entry["geometry"] for path, entry in modules.items()},
    }
    if dense:
        quantization["dense"] = {name: entry["geometry"] for name, entry in dense.items()}
    out = {**config, "quantization_config": quantization}
    out.pop("transformers_weights", None)
    return out


def carried_files(source: str | os.PathLike[str], more: Sequence[str] = ()) -> dict[str, bytes]:
    """Tokenizer, generation, chat-template and licence files of a model directory, by name.

    Args:
        source: the directory.
        more: further patterns.
    """
    out = {}
    for pattern in (*CARRIED, *more):
        for path in sorted(Path(source).glob(pattern)):
            if path.is_file() and path.suffix not in (".safetensors", ".bin"):
                out[path.name] = path.read_bytes()
    return out
