"""Processes that see neither one another's files nor mappings: each has a folder of its own for
activations and encoded batches, and what they share is sent."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from qmoe.calib.outputs import Durable, Known
from qmoe.errors import UnsupportedModelError
from qmoe.system.files import partial_of, writing
from qmoe.system.processes import World


def work_of(out: Path) -> Path:
    """The folder of a run's own files as this process names it; on another machine the same name
    may be another folder."""
    return partial_of(Path(os.path.abspath(out))) / "work"


def refuse_dense() -> None:
    """Raises:
    UnsupportedModelError: always; the statistics of --dense-bits take every process's files.
    """
    raise UnsupportedModelError(
        "--dense-bits on several machines needs a file system that they share; leave it out, or "
        "run on one machine"
    )


@contextmanager
def own_folder(out: Path, rank: int) -> Iterator[Path]:
    """A folder for a process that does not see the first one's. It stays after a run that failed,
    for the next, and is removed after one that came to its end.

    Args:
        out: that is being made elsewhere.
        rank: of the process, since several may be on this machine.
    """
    folder = work_of(out) / f"state-{rank}"
    with writing(folder):
        shutil.rmtree(folder / "exchange", ignore_errors=True)
        for part in ("exchange", "state"):
            (folder / part).mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # others of this machine, or the first, are still there
        folder.parent.rmdir()
        folder.parent.parent.rmdir()


def known(
    world: World, kept: Sequence[Durable], blocks: Sequence[str], batches: int
) -> list[Known]:
    """Which blocks' activations are whole on the disks of all processes.

    Args:
        world: the processes; all call this in step.
        kept: this process's outputs of every stream.
        blocks: names of all blocks.
        batches: of the run; a process keeps its own.
    """
    own = world.mine(batches)
    mine = [{name for name in blocks if stream.sound(name, own)} for stream in kept]
    found = world.collect(mine, "activations of finished blocks")
    return [Known(set.intersection(*stream)) for stream in zip(*found, strict=True)]
