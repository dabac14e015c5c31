"""Small compressions that tests interrupt, repeat and divide among processes."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from transformers import AutoTokenizer

from qmoe.compression import job as compression
from qmoe.compression.pipeline import compress
from qmoe.compression.settings import Settings
from qmoe.models.streamed import StreamedModel
from qmoe.source.checkpoint import open_checkpoint

Job = tuple[Path, Settings]


def make_job(tiny: ModuleType, folder: Path, shards: int = 1, **shape: int) -> Job:
    """A random Mixtral, and how `rd` compresses it with a few batches of text.

    Args:
        tiny: tests/tiny.py.
        folder: where source and text are put.
        shards: files of the source.
        shape: settings of the model.
    """
    source = tiny.save("mixtral", folder / "source", **shape)
    if shards > 1:
        tiny.to_shards(source, shards)
    tiny.save_tokenizer(source)
    text = tiny.save_text(folder / "text.txt", 9000)
    return source, Settings(method="rd", delta=8.0, calib=str(text), calib_tokens=8500, ctx=128)


def opened(
    source: Path, batches: Sequence[dict[str, Tensor]], **settings: object
) -> compression.Job:
    """A job whose source is open and whose calibration inputs are given; no text is read."""
    chosen = Settings(**{"method": "rd", "calib": "", **settings})
    streamed = StreamedModel(open_checkpoint(str(source)))
    tokenizer = AutoTokenizer.from_pretrained(source)
    device = torch.device("cpu")
    return compression.Job(chosen, streamed, tokenizer, batches, chosen.solver(), device)


def arguments(job: Job, out: Path) -> list[str]:
    """What follows "python" on the command line of the same compression."""
    source, s = job
    goal = ["--delta", str(s.delta)] if s.bits is None else ["--bits", str(s.bits)]
    options = ["--calib", s.calib, "--calib-tokens", str(s.calib_tokens), "--ctx", str(s.ctx)]
    return ["-m", "qmoe", "compress", str(source), str(out), *goal, *options]


def files(out: Path) -> dict[str, bytes]:
    """All of a checkpoint's bytes."""
    return {p.name: p.read_bytes() for p in out.iterdir()}


def undisturbed(job: Job, out: Path) -> dict[str, bytes]:
    """The files of a run by one process, to its end."""
    compress(str(job[0]), out, job[1])
    return files(out)


def record(out: Path, block: int) -> Path:
    """The file that says that a block is finished."""
    return out.with_name(out.name + ".partial") / "journal" / f"model.layers.{block}.json"


@contextmanager
def when(path: Path, act: Callable[[], object]) -> Iterator[None]:
    """Acts from another thread as soon as a file is there."""
    over = threading.Event()

    def wait() -> None:
        while not over.is_set():
            if path.exists():
                act()
                return
            time.sleep(0.002)

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
