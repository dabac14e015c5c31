"""Room for calibration activations: memory while a budget lasts, then files that are mapped into
memory.

The files lose their names as soon as they are mapped, so nothing is left behind after a crash; each
holds the raw values of one tensor. Knows nothing about models.
"""

import mmap
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from qmoe.errors import OutputError
from qmoe.system import text
from qmoe.system.processes import World


class ActivationStore:
    """Hands out tensors that outlive one batch; at most `budget` bytes of them are in anonymous
    memory.

    Mapped tensors behave as ordinary ones; the kernel writes them back and drops their pages under
    pressure, and `trim` takes them out of this process's resident memory, so that peak memory does
    not grow with the calibration set.
    """

    def __init__(self, budget: int, directory: Path | None = None) -> None:
        """Args: budget in bytes; directory for the files (default: the system's temporary
        directory), the same for all processes of a run.
        """
        self.budget, self.used, self.spilled = budget, 0, 0
        self._parent, self._count, self._shared = directory, 0, 0
        self._folder: Path | None = None
        self._maps: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of undefined values; call `release` when it is no longer needed.

        Raises:
            OutputError: the disk cannot take the file.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        if self.used + size <= self.budget or size == 0:
            self.used += size
            return torch.empty(shape, dtype=dtype)
        self.spilled += size
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="activations-", dir=self._parent))
        path = self._folder / str(self._count)
        self._count += 1
        _allocate(path, size)
        out = self._map(path, shape, dtype)
        path.unlink()
        return out

    def shared(self, world: World, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of undefined values that all processes of `world` see; they must call this in
        step. Processes that are apart have one each, and send what they write.

        Raises:
            OutputError: the disk cannot take the file. LostProcessError: a process is gone.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        if world.size == 1 or size == 0 or world.apart:
            return self.empty(shape, dtype)
        assert self._parent is not None, "processes share a directory"
        path = self._parent / f"shared-{self._shared}"
        self._shared += 1
        if world.first:
            _allocate(path, size)
        world.meet("room for activations")
        out = self._map(path, shape, dtype)
        world.meet("room for activations")
        if world.first:
            path.unlink()
        return out

    def _map(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        with path.open("r+b") as f:
            mapped = mmap.mmap(f.fileno(), 0)
        out = torch.frombuffer(mapped, dtype=dtype).view(shape)  # keeps `mapped` alive
        self._maps[out.data_ptr()] = mapped
        return out

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` on the CPU that the store accounts for."""
        out = self.empty(tuple(tensor.shape), tensor.dtype)
        out.copy_(tensor)
        return out

    def release(self, tensor: Tensor) -> None:
        """Returns an in-memory tensor's bytes to the budget; mapped ones were never on it."""
        if tensor.data_ptr() not in self._maps:
            self.used = max(0, self.used - tensor.nbytes)

    def trim(self) -> None:
        """Takes mapped tensors out of resident memory; their values stay in the files."""
        for mapped in list(self._maps.values()):
            mapped.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Removes the folder; mapped tensors still alive keep their data until they are
        collected.
        """
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _allocate(path: Path, size: int) -> None:
    """A file with all its blocks, so that a full disk is met here and not at a later access."""
    try:
        with path.open("wb") as f:
            os.posix_fallocate(f.fileno(), 0, size)
    except OSError as error:
        raise OutputError(
            f"{path.parent}: no room for {text.size(size)} of activations "
            f"({error.strerror}); free disk space or pass fewer --calib-tokens, then run the same "
            "command again"
        ) from error
