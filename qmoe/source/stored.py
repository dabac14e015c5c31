"""All tensors of a checkpoint as its files hold them: names over files, checked with the index."""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from qmoe.errors import SourceError
from qmoe.source.selection import Selection
from qmoe.source.shards import Shard, TorchShard

OPEN_MAPS = 4  # torch .bin files mapped at a time


class Stored:
    """Tensors as they are in the files of a checkpoint."""

    def __init__(self, shards: Sequence[Shard], where: dict[str, Shard] | None) -> None:
        """Args:
        shards: the files; of two that hold a tensor of the same name, the later one counts.
        where: the file of every tensor as an index has it, to be checked when a file is first
            looked into; None reads all headers now.
        """
        self.shards = list(shards)
        self._mapped: list[TorchShard] = []
        self._lock = threading.Lock()  # transformers' loader reads from several threads
        self._checked: set[Shard] = set()
        self.where = where or {}
        if where is None:
            for shard in shards:
                self.where.update(dict.fromkeys(shard.entries, shard))
            self._checked.update(shards)
        self.in_shard: dict[Shard, set[str]] = {s: set() for s in self.shards}
        for name, owner in self.where.items():
            self.in_shard[owner].add(name)

    def check(self, shard: Shard) -> None:
        """Compare a file's header with the index; done once per file, for remote files when they
        are first looked into.
        """
        if shard in self._checked:
            return
        present = shard.entries
        for name in present:
            owner = self.where.get(name)
            if owner is None:
                raise SourceError(
                    f"{shard.name} holds {name!r}, which the index does not name; index and files "
                    "are of different checkpoints"
                )
            if owner is not shard:
                raise SourceError(
                    f"tensor {name!r} is in {owner.name} and in {shard.name}; remove the "
                    "duplicate or the wrong file"
                )
        absent = self.in_shard[shard] - set(present)
        if absent:
            raise SourceError(
                f"the index says that {min(absent)!r} is in {shard.name}, which does not hold it; "
                "download both again"
            )
        self._checked.add(shard)

    def _owner(self, name: str) -> Shard:
        shard = self.where.get(name)
        if shard is None:
            raise SourceError(
                f"tensor {name!r} is not in the checkpoint ({len(self.where)} tensors in "
                f"{len(self.shards)} files)"
            )
        self.check(shard)
        return shard

    def names(self) -> list[str]:
        return sorted(self.where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._owner(name).entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._owner(name).entries[name].dtype

    def read(self, name: str, selection: Selection = ...) -> Tensor:
        shard = self._owner(name)
        if not isinstance(shard, TorchShard):
            return shard.read(name, selection)
        with self._lock:
            if shard in self._mapped:
                self._mapped.remove(shard)
            self._mapped.append(shard)
            while len(self._mapped) > OPEN_MAPS:
                self._mapped.pop(0).close()
            return shard.read(name, selection)

    def prefetch(self, name: str) -> None:
        """Start reading in the background; says nothing of failures, the read itself will."""
        self.where[name].prefetch(name)
