"""Writing a compressed checkpoint: a directory that appears complete or not at all.

While it grows, everything lies in ``OUT.partial``: finished shards under ``data``, their records
under ``journal``. A block of the model is durable once its record is written; after a crash the
same job goes on at the first block without a record. When all is there, ``data`` is renamed to
``OUT``. No file holds a time, a host name or a path, so equal inputs give equal bytes.

``docs/format.md`` specifies the result. Knows nothing about calibration, solvers or models beyond
the names of tensors.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from qmoe.errors import CorruptError, OutputError
from qmoe.store.block import BlockWriter, record_path
from qmoe.store.manifest import FORMAT_VERSION, MANIFEST, read_sealed, write_sealed
from qmoe.system.files import (
    canonical_json,
    check_no_partial,
    check_vacant,
    file_sha256,
    partial_of,
    sync_directory,
    take_lock,
    write_file,
    writing,
)

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
TEMPLATES = "additional_chat_templates"


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
            writer.finish(blocks, config=..., settings=..., versions=..., source=..., files=...)
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
        # a copy never touches what a compression of the same name left
        self._root = (
            self.out.with_name(f"{self.out.name}.copy") if replace else partial_of(self.out)
        )
        self._data, self._journal = self._root / "data", self._root / "journal"
        self.work = self._root / "work"  # for files of the run that do not become part of `out`
        self._check_free()
        if replace:
            check_no_partial(self.out)
        with writing(self._root):
            self._root.mkdir(parents=True, exist_ok=True)
        self._lock = take_lock(self._root, self.out)
        try:
            self._check_free()  # the run that held the lock may have finished meanwhile
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
        self._records: dict[str, dict[str, Any]] | None = None  # None: the journal is not read yet

    def _check_free(self) -> None:
        if not self._replace:
            check_vacant(self.out)

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
        """Blocks that are durable: {name: the `note` of its writer}. Files that an earlier run left
        are compared with their checksums, once.

        A block with a damaged record or shard is not finished; it is written again.
        """
        return {name: record["note"] for name, record in self._sound_records().items()}

    def _sound_records(self) -> dict[str, dict[str, Any]]:
        if self._records is None:
            found = (self._sound_record(path) for path in sorted(self._journal.glob("*.json")))
            self._records = {record["name"]: record for record in found if record is not None}
        return self._records

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
        records = self._sound_records()
        records.pop(name, None)

        def keep(record: dict[str, Any]) -> None:
            records[name] = record

        return BlockWriter(self._data, self._journal, name, self._max, keep)

    def finish(
        self,
        blocks: Sequence[str],
        *,
        config: Mapping[str, Any],
        settings: Mapping[str, Any],
        versions: Mapping[str, str],
        source: Mapping[str, Any],
        report: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> Path:
        """Completes the checkpoint and makes it visible under its name.

        Args:
            blocks: all blocks, in the order of the model.
            config: the model's config.json as JSON values; `quantization_config` is filled in.
            settings: how it was compressed.
            versions: of the libraries that took part.
            source: what was compressed, e.g. {"name": ..., "bytes": ...}.
            report: more entries for the manifest's report, beside "modules" and "dense".
            files: small files by name, e.g. `carried_files` of the source.

        Returns:
            The output directory.

        Raises:
            ValueError: a block is not finished, or two blocks hold the same tensor.
            OutputError: the disk refuses, or the directory appeared meanwhile.
        """
        records = self._sound_records()
        if missing := [name for name in blocks if name not in records]:
            raise ValueError(f"blocks {missing} are not finished")
        whole = _merged([records[name] for name in blocks])
        for stale in self._data.iterdir():  # shards of blocks that are not part of the model
            if stale.name not in whole["files"]:
                stale.unlink()
        small = {
            **(files or {}),
            "config.json": canonical_json(_with_modules(config, whole["modules"], whole["dense"])),
            INDEX: canonical_json(_index(whole["files"], [records[name] for name in blocks])),
        }
        whole["files"] |= {name: self._put(name, data) for name, data in sorted(small.items())}
        manifest = {
            "format_version": FORMAT_VERSION,
            "files": whole["files"],
            "tensors": whole["tensors"],
            "blocks": {name: sorted(records[name]["files"]) for name in blocks},
            "settings": dict(settings),
            "versions": dict(versions),
            "source": dict(source),
            "report": {
                **(report or {}),
                "modules": {path: e["report"] for path, e in whole["modules"].items()},
                "dense": {name: e["report"] for name, e in whole["dense"].items()},
            },
        }
        write_sealed(self._data / MANIFEST, manifest)
        self._publish()
        return self.out

    def _put(self, name: str, data: bytes) -> dict[str, Any]:
        """Writes a small file; returns its entry of the manifest."""
        write_file(self._data / name, data)
        return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

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


def downloads_of(out: str | os.PathLike[str]) -> Path:
    """Where a run that writes `out` may put files of its source; gone when `out` is complete."""
    return partial_of(Path(os.path.abspath(out))) / "source"


def _merged(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the records of all blocks list, together."""
    out: dict[str, dict[str, Any]] = {k: {} for k in ("files", "tensors", "modules", "dense")}
    for record in records:
        if twice := out["tensors"].keys() & record["tensors"].keys():
            raise ValueError(
                f"block {record['name']}: {sorted(twice)[:3]} are in another block, too"
            )
        for key, known in out.items():
            known |= record[key]
    return out


def _index(files: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The index that transformers reads."""
    return {
        "metadata": {"total_size": sum(entry["bytes"] for entry in files.values())},
        "weight_map": {
            name: entry["file"]
            for record in records
            if record["name"] != CARRIED_BLOCK  # transformers must not look for their modules
            for name, entry in record["tensors"].items()
        },
    }


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
    return _one_folder(Path(source), out)


def _one_folder(source: Path, files: dict[str, bytes]) -> dict[str, bytes]:
    """The files with the chat templates of a folder of their own put where transformers reads
    several, too: into tokenizer_config.json. What a checkpoint consists of lies in one folder.
    """
    found = {p.stem: p.read_text("utf-8") for p in sorted((source / TEMPLATES).glob("*.jinja"))}
    if not found:
        return files
    default = files.get("chat_template.jinja")
    named = {"default": default.decode("utf-8"), **found} if default is not None else found
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    config["chat_template"] = [{"name": n, "template": t} for n, t in named.items()]
    out = {n: data for n, data in files.items() if n != "chat_template.jinja"}
    return out | {"tokenizer_config.json": json.dumps(config, indent=2).encode()}
