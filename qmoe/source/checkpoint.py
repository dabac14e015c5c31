"""Source checkpoints as plain dense tensors, read lazily, whatever the files hold.

A checkpoint is a local directory or a model id of the hub, with safetensors (one file or sharded
with an index) or torch .bin files. Quantized sources (fp8, MXFP4, NVFP4, packed integers, GPTQ,
AWQ) appear under their dense names, decoded while read. Nothing is ever written to a local source.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from qmoe.errors import SourceError
from qmoe.source.foreign import refuse_foreign, refuse_wrapped
from qmoe.source.formats.recognise import recognise
from qmoe.source.formats.settings import (
    quantization_settings,
    settings_beside,
    without_settings,
)
from qmoe.source.formats.virtual import Virtual
from qmoe.source.hub import HubShard, Repository
from qmoe.source.index import read_config, read_index, weight_files
from qmoe.source.selection import Selection
from qmoe.source.shards import SafetensorsShard, Shard, TorchShard
from qmoe.source.stored import Stored
from qmoe.system.hub import split_revision
from qmoe.system.tensors import DTYPE_NAMES

# key of config.json: the quantization_config of tensors that a dense checkpoint carries along
CARRIED_SETTINGS = "carried_quantization_config"
FP8_DTYPES = {d for d in DTYPE_NAMES if d.is_floating_point and d.itemsize == 1}


class Lazy:
    """A tensor still on disk, in the form that transformers' loader takes: it calls ``lazy[...]``
    when it needs the values.
    """

    def __init__(self, checkpoint: "Checkpoint", name: str, selection: Selection) -> None:
        self._checkpoint, self._name, self._selection = checkpoint, name, selection

    def get_dtype(self) -> str:
        """The dtype as safetensors spells it ("BF16")."""
        return DTYPE_NAMES[self._checkpoint.dtype(self._name)]

    def get_shape(self) -> list[int]:
        """Shape of the whole tensor, also where only a part was selected."""
        return list(self._checkpoint.shape(self._name))

    def __getitem__(self, selection: Selection) -> Tensor:
        if isinstance(selection, EllipsisType):
            return self._checkpoint.read(self._name, self._selection)
        if isinstance(self._selection, EllipsisType):
            return self._checkpoint.read(self._name, selection)
        return self._checkpoint.read(self._name, self._selection)[selection]


class Checkpoint:
    """A source checkpoint; made by `open_checkpoint`.

    Attributes:
        directory: local directory with config and tokenizer files (for the hub: its snapshot
            without weights).
        config: config.json without its quantization settings, since the tensors presented here are
            dense.
        quantization: name of the source's low-precision format ("fp8", "mxfp4", "nvfp4", "int4",
            "gptq int4", "awq int4"), or None.
        origin: where it comes from: {"name": directory name}, or for the hub {"name": model id,
            "revision": commit}.
        settings: the source's quantization settings, which say what its quantized tensors mean;
            for a plain checkpoint that `qmoe export` wrote, those of the tensors that it carries
            along; None if nothing is quantized.
    """

    def __init__(
        self,
        directory: Path,
        config: dict[str, Any],
        stored: Stored,
        identity: str,
        origin: dict[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self.origin = origin or {"name": directory.absolute().name}
        self._identity = identity
        self._stored = stored
        self._virtual: dict[str, Virtual] = {}
        self._hidden: set[str] = set()
        self._expected: set[str] = set()
        self._deletes = True
        self.quantization: str | None = None
        refuse_wrapped(stored.names(), str(directory))
        stated = quantization_settings(config)
        carried = quantization_settings(config, (CARRIED_SETTINGS,))
        beside = None if stated or carried else settings_beside(directory)
        self.settings = stated or carried or beside
        if self.settings is not None:
            name, self._virtual, self._hidden = recognise(stored, self.settings)
            if stated or (beside and self._virtual):
                self.quantization = name
            elif beside:  # a file of settings that was left beside dense weights
                self.settings = None
        self.config = without_settings(config)

    def names(self) -> list[str]:
        """Dense tensor names, sorted."""
        return sorted((set(self._stored.where) - self._hidden) | set(self._virtual))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a dense tensor."""
        virtual = self._virtual.get(name)
        return (
            virtual.shape(self._stored)
            if virtual is not None
            else self._stored.shape(self._visible(name))
        )

    def dtype(self, name: str) -> torch.dtype:
        """dtype that `read` returns; bf16 for what is quantized in the source."""
        virtual = self._virtual.get(name)
        return virtual.dtype if virtual is not None else self._stored.dtype(self._visible(name))

    def read(self, name: str, selection: Selection = ...) -> Tensor:
        """A tensor or a part of it, reading only the bytes that the leading dimension of the
        selection needs.

        Args:
            name: dense tensor name.
            selection: int, slice, ``...`` or a tuple of them; ``slice(e, e + 1)`` of a fused expert
                tensor reads expert e alone.

        Returns:
            A tensor on the CPU that owns its memory.

        Raises:
            SourceError: no such tensor, the file changed since it was opened, or it cannot be read.
        """
        virtual = self._virtual.get(name)
        if virtual is not None:
            return virtual.read(self._stored, selection)
        return self._stored.read(self._visible(name), selection)

    def parts(self, name: str) -> tuple[str, ...]:
        """Names of the stored tensors that a dense tensor is made of: its own, or those of a
        quantized tensor's words and scales.
        """
        virtual = self._virtual.get(name)
        return virtual.parts if virtual is not None else (self._visible(name),)

    def aside(self) -> list[str]:
        """Names of the stored tensors that no dense tensor is made of: scales of activations."""
        used = {p for v in self._virtual.values() for p in v.parts}
        return sorted(self._hidden - used)

    def stored_names(self) -> list[str]:
        """Names of all tensors in the files, sorted."""
        return self._stored.names()

    def read_stored(self, name: str) -> Tensor:
        """A tensor by its name in the files, bytes and dtype as they are there."""
        return self._stored.read(name)

    def lazy(self, name: str, selection: Selection = ...) -> Lazy:
        """The tensor as an object that transformers' ``convert_and_load_state_dict_in_model``
        accepts; nothing is read yet.
        """
        return Lazy(self, name, selection)

    @property
    def source_bytes(self) -> int:
        """Bytes of all weight files, as shipped."""
        return sum(s.size for s in self._stored.shards)

    def stored_bytes(self, name: str) -> int:
        """Bytes of a dense tensor as the source stores it, scales included."""
        total = 0
        for part in self.parts(name):
            n = self._stored.dtype(part).itemsize
            for d in self._stored.shape(part):
                n *= d
            total += n
        return total

    def fingerprint(self) -> str:
        """sha256 over config, file names, sizes, headers and last bytes: equal for copies,
        different for another checkpoint.

        It costs no reading of the weights; a flipped bit in the middle of a file is not seen.
        """
        h = hashlib.sha256(self._identity.encode())
        for shard in self._stored.shards:
            h.update(Path(shard.name).name.encode() + b"\0" + shard.digest())
        return h.hexdigest()

    def prefetch(self, names: Iterable[str]) -> None:
        """Say that tensors will be read soon: their files are downloaded, or their bytes read into
        the system's page cache, while the caller goes on. A hint: nothing is returned or raised.
        """
        for name in names:
            for part in self._parts(name):
                self._stored.prefetch(part)

    @property
    def temporary(self) -> bool:
        """Whether downloaded files go to a `cache` of the run, from which `expect` and `finished`
        delete them.
        """
        return any(isinstance(s, HubShard) and s.temporary for s in self._stored.shards)

    def in_file_order(self, names: Iterable[str]) -> list[str]:
        """Tensors sorted by the file that holds them, then by name."""
        place = {shard: i for i, shard in enumerate(self._stored.shards)}
        return sorted(names, key=lambda n: (place[self._stored.where[self._parts(n)[0]]], n))

    def expect(
        self, names: Iterable[str], delete: bool = True, first: Iterable[str] | None = None
    ) -> None:
        """Say which tensors will be read from now on: downloaded files without any of them are
        deleted from the run's `cache`. Others can still be read; their files come again.

        Without a `cache` directory, and for local sources, nothing is ever deleted.

        Args:
            names: of dense tensors or of those in the files.
            delete: False in all but one of several processes that share the directory; meanwhile
                the others read nothing that is not among `names`.
            first: those that are read before any other; a file that is here and holds none of
                them is deleted, too, and comes again when it is needed. None: all of `names`.
        """
        expected = {part for name in names for part in self._parts(name)}
        soon = expected if first is None else {p for name in first for p in self._parts(name)}
        for shard in self._stored.shards:
            if isinstance(shard, HubShard) and shard.temporary:
                shard.forget()
        self._deletes, self._expected = delete, soon
        self._sweep()
        self._expected = expected

    def finished(self, names: Iterable[str]) -> None:
        """Say that no process expects these tensors any more, see `expect`."""
        for name in names:
            self._expected.difference_update(self._parts(name))
        self._sweep()

    def _sweep(self) -> None:
        if not self._deletes:
            return
        for shard, held in self._stored.in_shard.items():
            if isinstance(shard, HubShard) and held.isdisjoint(self._expected):
                shard.discard()

    def _parts(self, name: str) -> Sequence[str]:
        """`parts`, of names in the files, too."""
        virtual = self._virtual.get(name)
        return virtual.parts if virtual is not None else (name,)

    def validate(self) -> None:
        """Check every header, the index, and that every quantized tensor is complete. Done at
        opening for local sources.

        Raises:
            SourceError: with the file and the values.
        """
        for shard in self._stored.shards:
            self._stored.check(shard)
        for virtual in self._virtual.values():
            virtual.shape(self._stored)
        for name in self._stored.where:
            if (
                name not in self._virtual
                and name not in self._hidden
                and self._stored.dtype(name) in FP8_DTYPES
            ):
                raise SourceError(
                    f"tensor {name!r} is {self._stored.dtype(name)} without a scale beside it; is "
                    "config.json's quantization_config right?"
                )

    def _visible(self, name: str) -> str:
        if name in self._hidden:
            raise SourceError(f"tensor {name!r} is part of a quantized tensor; read the dense one")
        return name


def open_checkpoint(source: str | Path, cache: str | Path | None = None) -> Checkpoint:
    """Open a checkpoint without reading weights.

    Args:
        source: local directory, or "owner/name" on the hub, with "@revision" for a branch, tag or
            commit that is not the default branch.
        cache: directory for the weight files that a run downloads; see `Checkpoint.expect`. None
            keeps them in the hub's cache.

    Raises:
        SourceError: nothing there, incomplete, damaged, or in a format that is not supported; or a
            `cache` for a source whose files cannot be fetched and deleted one by one.
    """
    path = Path(source)
    if path.is_dir():
        if cache is not None:
            raise SourceError(
                f"{path} is a local directory, of which nothing is ever deleted; --source-cache "
                "drop is for models of the hub, leave it out"
            )
        checkpoint = _open_local(path)
        checkpoint.validate()
        return checkpoint
    return _open_hub(_repository(source, Path(cache) if cache is not None else None))


def directory_of(source: str | Path) -> Path:
    """Where config, tokenizer and whatever else is no weight file of a checkpoint lie: the
    directory itself, or that to which the hub's were downloaded.

    Args:
        source: as for `open_checkpoint`.

    Raises:
        SourceError: nothing there.
    """
    return Path(source) if Path(source).is_dir() else _repository(source, None).directory


def _repository(source: str | Path, cache: Path | None) -> Repository:
    if Path(source).exists():
        raise SourceError(
            f"{source} is a file; give the directory that holds config.json and the weights"
        )
    text = str(source)
    name, revision = split_revision(text)
    parts = name.split("/")
    if Path(source).is_absolute() or text.startswith((".", "~")) or len(parts) > 2 or "" in parts:
        raise SourceError(
            f"{text!r} does not exist, and it is no model id of the hub (owner/name or "
            "owner/name@revision); check the path"
        )
    return Repository(name, revision, cache)


def _open_local(directory: Path) -> Checkpoint:
    files = {p.name for p in directory.iterdir()}
    refuse_foreign(directory, files)
    config, text = read_config(directory)

    def shard(name: str) -> Shard:
        if not (directory / name).is_file():
            raise SourceError(f"{directory}: the index names {name}, which is missing; download it")
        return (
            TorchShard(directory / name)
            if name.endswith(".bin")
            else SafetensorsShard(directory / name)
        )

    single, index = weight_files(files, str(directory), config.get("transformers_weights"))
    shards = [shard(single)] if single is not None else read_index(directory / index, shard)[0]
    # as transformers: what the files hold counts, not what an index says of them
    return Checkpoint(directory, config, Stored(shards, None), text)


def _open_hub(repository: Repository) -> Checkpoint:
    files = set(repository.files())
    refuse_foreign(repository.directory, files)
    config, text = read_config(repository.directory)
    single, index = weight_files(files, repository.repo, config.get("transformers_weights"))

    def shard(name: str) -> Shard:
        if name.endswith(".bin"):  # pickles have no header to ask for: the whole file comes at once
            if repository.cache is not None:
                raise SourceError(
                    f"{repository.repo} holds {name}, and all files of this kind are needed to "
                    "know its tensors; leave out --source-cache drop"
                )
            return TorchShard(repository.fetch(name))
        return HubShard(repository, name)

    if single is not None:
        stored = Stored([shard(single)], None)
    else:
        stored = Stored(*read_index(repository.directory / index, shard))
    origin = {"name": repository.repo, "revision": repository.revision}
    return Checkpoint(repository.directory, config, stored, text, origin)
