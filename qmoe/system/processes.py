"""Several processes that work on one run: who this one is, meeting points, small messages.

Started by ``torchrun``; data goes through files that all processes map, and only small messages
through torch.distributed (gloo, also beside GPUs). A single process pays nothing: its `World` has
no process group and every meeting returns at once.

Processes on several machines may see one file system with coherent shared mappings, or not (each
its own disk; NFS): `look` finds out, and `apart` says that what they share must be sent. Knows
nothing about models.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from mmap import mmap
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qmoe.errors import LostProcessError, reason
from qmoe.system.files import writing

PATIENCE = timedelta(hours=12)  # a dead process is noticed at once; this is for one that hangs
_T = TypeVar("_T")


class World:
    """The processes of this run. A context manager; `alone()` is the one of a single process.

    Attributes:
        rank: number of this process; 0 writes the result.
        size: number of processes.
        apart: they do not see one another's files and mappings; see `look`.
    """

    apart = False

    def __init__(self, rank: int = 0, size: int = 1, here: int = 1) -> None:
        """Args: rank, size: see the class. here: processes on this machine."""
        self.rank, self.size, self.here = rank, size, here

    @classmethod
    def of_environment(cls, patience: timedelta = PATIENCE) -> Self:
        """Joins the processes that torchrun started, if it did.

        Args:
            patience: how long to wait for a process that is alive but silent.

        Raises:
            LostProcessError: the others cannot be reached.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        world = cls(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
        with world._contact("start"):
            dist.init_process_group("gloo", timeout=patience)
        return world

    @property
    def first(self) -> bool:
        """Whether this process writes the result and speaks for all."""
        return self.rank == 0

    def meet(self, what: str) -> None:
        """Waits until every process is here; what they wrote before is then visible to all.

        Args:
            what: for the message if one does not come.

        Raises:
            LostProcessError: a process ended or is silent.
        """
        if self.size > 1:
            with self._contact(what):
                dist.monitored_barrier()

    def share(self, make: Callable[[], _T], what: str) -> _T:
        """A value that the first process makes, for all of them."""
        if self.size == 1:
            return make()
        box = [make() if self.first else None]
        with self._contact(what):
            dist.broadcast_object_list(box)
        return box[0]  # type: ignore[return-value]

    def collect(self, value: _T, what: str) -> list[_T]:
        """Every process's value, by rank, for all of them."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        with self._contact(what):
            dist.all_gather_object(out, value)
        return out

    def look(self, folder: Path) -> None:
        """Finds out whether the processes are `apart`: each writes its mark into a mapping of one
        file, and looks for the marks of all.

        Args:
            folder: as this process sees it; made by the first.
        """
        if self.size == self.here:  # one machine
            return
        path = folder / "seen"
        if self.first:
            with writing(path):
                path.write_bytes(bytes(self.size))
        self.meet("what is shared")
        marks: mmap | None = None
        with suppress(OSError, ValueError), path.open("r+b") as f:
            marks = mmap(f.fileno(), self.size)
            marks[self.rank] = 1
        self.meet("marks")
        sees = marks is not None and marks[:] == bytes([1]) * self.size
        self.apart = not all(self.collect(sees, "who sees what"))
        if marks is not None:
            marks.close()
        if self.first:
            path.unlink()

    def spread(self, tensor: Tensor, owner: int) -> None:
        """Copies the values of one process to all, in place.

        Args:
            tensor: contiguous, on the CPU, of one shape everywhere.
            owner: rank whose values count.
        """
        if self.size > 1 and tensor.numel():
            with self._contact("values of another process"):
                dist.broadcast(tensor.view(-1).view(torch.uint8), src=owner)

    def gather(self, value: _T, what: str) -> list[_T]:
        """Every process's value, by rank, for the first; the others get an empty list."""
        if self.size == 1:
            return [value]
        out: list[Any] | None = [None] * self.size if self.first else None
        with self._contact(what):
            dist.gather_object(value, out)
        return out or []

    def mine(self, count: int) -> range:
        """Which of `count` equal pieces of work this process does: every size-th."""
        return range(self.rank, count, self.size)

    @contextmanager
    def _contact(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # all that torch.distributed raises derives from it
            raise LostProcessError(
                f"process {self.rank} of {self.size} lost contact with the others at: {what} "
                f"({reason(error)}); one of them ended, see its message. The same command, with "
                "any number of processes, continues at the first unfinished block"
            ) from error

    def close(self) -> None:
        """Leaves the group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
