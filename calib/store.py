"""Room for calibration activations: memory while a budget lasts, then files that are mapped into
memory.

The files are unlinked by their owner (`close`), and hold raw values of one tensor each. Knows
nothing about models.
"""

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from qmoe.errors import OutputError


class ActivationStore:
    """Hands out tensors that outlive one batch; at most `budget` bytes of them are in anonymous
    memory.

    Mapped tensors behave as ordinary ones; the kernel writes them back and drops their pages under
    pressure, so peak resident memory does not grow with the calibration set.
    """

    def __init__(self, budget: int, directory: Path | None = None) -> None:
        """Args: budget in bytes; directory for the files (default: the system's temporary
        directory).
        """
        self.budget, self.used, self.spilled = budget, 0, 0
        self._parent, self._count = directory, 0
        self._folder: Path | None = None

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor; call `release` when it is no longer needed.

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
        try:
            with path.open("wb") as f:
                os.posix_fallocate(f.fileno(), 0, size)
        except OSError as error:
            raise OutputError(
                f"{self._folder}: no room for {size / 2**20:.0f} MiB of activations "
                f"({error.strerror}); "
                "free disk space or pass fewer --calib-tokens"
            ) from error
        flat = torch.from_file(str(path), shared=True, size=torch.Size(shape).numel(), dtype=dtype)
        path.unlink()  # the mapping keeps the data; nothing is left behind after a crash
        return flat.view(shape)

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` on the CPU that the store accounts for."""
        out = self.empty(tuple(tensor.shape), tensor.dtype)
        out.copy_(tensor)
        return out

    def release(self, tensor: Tensor) -> None:
        """Returns an in-memory tensor's bytes to the budget; mapped ones cost nothing to hold."""
        self.used = max(0, self.used - tensor.nbytes)

    def close(self) -> None:
        """Removes the folder; mapped tensors that are alive keep their data until collected."""
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
