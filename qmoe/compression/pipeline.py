"""The write path: source -> calibration -> solver -> codec -> container, one block of the model at
a time.

Peak memory: one block without its experts, one group of experts with its Hessians, and the
activations that `--memory` allows; never the model. docs/scale.md has the arithmetic and the
measurements.

A block is finished when its activations and then its record are on the disk; a run that was
interrupted goes on at the first block that is not. Several processes share batches and groups of
experts and give the same bytes.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qmoe.calib import default_text
from qmoe.calib.activations import ActivationStore
from qmoe.calib.batches import check_tokens, described, inputs_only, prepare, split_batches
from qmoe.calib.outputs import Durable, Sound, resume_point
from qmoe.compression import apart, unseen
from qmoe.compression.blocks import BlockLoop
from qmoe.compression.carried import account, write_carried
from qmoe.compression.dense import HEAD, DenseCoder
from qmoe.compression.identity import identity, versions
from qmoe.compression.job import Job
from qmoe.compression.plan import make_plan
from qmoe.compression.probe import probed
from qmoe.compression.rate import Controller, Curve, missed
from qmoe.compression.report import CompressReport, advice
from qmoe.compression.settings import Settings
from qmoe.compression.target import settle_model_bits
from qmoe.compression.unseen import BATCH_TOKENS
from qmoe.errors import InterruptedRunError
from qmoe.models.classes import check_generation, embeddings, plain_config, read_tokenizer
from qmoe.models.code import loading_code
from qmoe.models.downloads import begin_walk, leave
from qmoe.models.streamed import BlockRef, StreamedModel
from qmoe.source.checkpoint import open_checkpoint
from qmoe.store.writer import ContainerWriter, carried_files, downloads_of
from qmoe.system.files import canonical_json
from qmoe.system.heap import peak_rss_bytes
from qmoe.system.machine import pick_device
from qmoe.system.processes import World

_REST = "rest"  # name of the unit of the container that holds what is outside the blocks
Say = Callable[[str], object]
_DEFAULTS = Settings()


def compress(
    source: str,
    out: str | os.PathLike[str],
    settings: Settings = _DEFAULTS,
    progress: bool = False,
    world: World | None = None,
    say: Say = lambda text: None,
) -> CompressReport:
    """Compresses a checkpoint, or goes on with what an interrupted run of the same settings left.

    Args:
        source: local directory or hub id.
        out: directory to make; it must not exist.
        settings: see `Settings`.
        progress: draw bars.
        world: the processes that work on this together; all call this with the same arguments.
        say: receives the plan and where a run is resumed, in the first process.

    Raises:
        QmoeError: the input's fault, see qmoe.errors; the source is never written to and `out`
            never half-made. InterruptedRunError: ctrl-C.
    """
    start, out = time.monotonic(), Path(out)
    world = world or World()
    if not world.first:
        progress, say = False, lambda text: None
    run = Compression(open_job(source, out, settings, world, progress, say), out, say)
    run.to_the_end()
    seconds = time.monotonic() - start
    report = world.share(lambda: CompressReport.of(out, seconds, peak_rss_bytes()), "the report")
    found = report.sizes
    for target, got, option in (
        (settings.target, found.bits_per_weight, "--bits"),
        (settings.model_bits, found.model_bits_per_weight, "--model-bits"),
    ):
        if target is not None and (sentence := missed(target, got, option)):
            say(sentence)
    if sentence := advice(settings, found):
        say(sentence)
    return report


def open_job(
    source: str,
    out: Path,
    settings: Settings,
    world: World,
    progress: bool = False,
    say: Say = lambda text: None,
) -> Job:
    """Opens a source and reads the calibration text; no weight is read and nothing written.

    Args:
        source, out, settings, world, progress, say: see `compress`.

    Raises:
        QmoeError: settings, source or text are not usable.
    """
    device, method = pick_device(settings.device), settings.solver()
    cache = downloads_of(out) if settings.source_cache == "drop" else None
    checkpoint = open_checkpoint(source, cache=cache)
    trusted = settings.trust_remote_code
    streamed = StreamedModel(checkpoint, trust_remote_code=trusted, device=device)
    if settings.with_code:
        loading_code(streamed.config, type(streamed.model))  # refused now, not after hours
    check_generation(checkpoint.directory)
    tokenizer = read_tokenizer(checkpoint.directory, trusted)
    text = (settings.calib, settings.calib_tokens, settings.context(streamed.config))
    data = prepare(tokenizer, streamed.config, *text, settings.seed, **settings.calib_rows)
    check_tokens(data, tokenizer, embeddings(streamed.model))
    say(f"calibration {described(data, tokenizer, settings.calib_rows.get('bos', 'auto'))}")
    batches = [inputs_only(b) for b in split_batches(data, BATCH_TOKENS)]
    parts = (settings, streamed, tokenizer, batches, method, device, world)
    return unseen.with_room(settle_model_bits(Job(*parts, progress=progress)))


class Compression:
    """One run, from the plan to a finished directory.

    `to_the_end` goes through the stages in order: `_begin`, `_resume`, `_learn`, `_settle_rest`,
    `_run_blocks`, `_finish`.
    """

    def __init__(self, job: Job, out: Path, say: Say) -> None:
        """Makes the plan and says it; nothing is written.

        Args:
            job: the run.
            out: directory to make.
            say: receives sentences for the user.

        Raises:
            CapacityError: the run does not fit.
        """
        settings, streamed = job.settings, job.streamed
        self.out, self.say, self.first = out, say, job.world.first
        self.job = job
        self.blocks = list(streamed.blocks())
        self.dense = DenseCoder(job, settings.dense_bits) if settings.dense_bits < 16 else None
        self.plan = make_plan(job, out, self.dense)
        say(self.plan.text())
        self._say_what_is_not_asked(settings)
        self.identity = identity(job)
        self.writer: ContainerWriter | None = None  # in the first process
        self.finished: dict[str, Any] = {}  # notes of finished blocks, by name
        self.done = 0  # blocks of the model to go on after

    def _say_what_is_not_asked(self, settings: Settings) -> None:
        """Says what was decided where the user left it open."""
        if settings.model_bits is not None:
            self.say(
                f"--model-bits {settings.model_bits:g}: experts {settings.bits:.3g} bits per "
                f"weight, everything else {settings.dense_bits:.3g}"
            )
        if settings.calib is None:
            text = self.job.batches[: len(self.job.batches) - self.job.own]
            got = sum(batch["input_ids"].numel() for batch in text)
            asked = settings.calib_tokens
            self.say(default_text.describe(self.job.tokenizer, asked, got))

    def to_the_end(self) -> None:
        """Writes the directory.

        Raises:
            QmoeError: see `compress`.
        """
        with ExitStack() as stack:
            self._begin(stack)
            self.job.streamed.load_rest()
            self.job.world.meet("what is outside the blocks")  # nobody needs its files any more
            self._resume()
            with self._continuable(self.blocks[self.done :]):
                self._learn()
                carried = self._settle_rest()
            self._run_blocks()
            self._finish(carried)
            self.job.world.meet("end of the run")

    def _begin(self, stack: ExitStack) -> None:
        """Takes the output directory, and room for activations beside it."""
        if self.first:
            fresh = self.job.settings.fresh
            self.writer = ContainerWriter(self.out, job=self.identity, resume=not fresh)
            stack.enter_context(self.writer)
        self.work = self.job.world.share(self._clean, "begin of the run")
        self.job.world.look(apart.work_of(self.out))
        if self.job.world.apart:
            if self.dense is not None:
                apart.refuse_dense()
            if not self.first:
                own = apart.own_folder(self.out, self.job.world.rank)
                self.work = stack.enter_context(own)
        store = stack.enter_context(ActivationStore(self.plan.store, self.work))
        self.job = replace(self.job, store=store)
        run_id = hashlib.sha256(canonical_json(self.identity)).hexdigest()
        names = ["quantized", "original"] if self.job.method.drift > 0 else ["quantized"]
        self.kept = [Durable(self.work / "state" / n, f"{run_id} {n}") for n in names]

    def _clean(self) -> Path:
        """The folder of the run's own files, without what a run that died left, but its state."""
        assert self.writer is not None
        for left in self.writer.work.iterdir():
            if not left.name.startswith("state"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        (self.writer.work / "exchange").mkdir()
        return self.writer.work

    def _resume(self) -> None:
        """Finds out which blocks are finished."""
        kept: Sequence[Sound] = self.kept
        if self.job.world.apart:
            names = [b.name for b in self.blocks]
            kept = apart.known(self.job.world, self.kept, names, len(self.job.batches))
        found = self.job.world.share(lambda: self._progress(kept), "what is finished")
        self.finished, self.done = found

    def _progress(self, kept: Sequence[Sound]) -> tuple[dict[str, Any], int]:
        assert self.writer is not None
        finished = self.writer.finished_blocks()
        names = [(b.list_name, b.name) for b in self.blocks]
        done, had = resume_point(names, finished, kept, len(self.job.batches))
        if _REST not in finished:
            return finished, 0
        if done < had:
            self.say(
                f"{had} blocks are finished, but the activations behind {names[had - 1][1]} are "
                f"missing or damaged; going back to block {names[done][1]}"
            )
        elif done:
            then = f"continuing at block {names[done][1]}" if done < len(names) else "completing"
            self.say(f"{done} of {len(names)} blocks are finished; {then}")
        return finished, done

    def _learn(self) -> None:
        """Learns what the model says by itself and what each layer will take, or remembers it."""
        known = self.finished.get(_REST, {})
        self.job = job = unseen.with_own_words(self.job, known.get("own_words"))
        if self.dense is not None:
            self.dense.learn_from(job)
        self.loop = BlockLoop(job, self.kept, self.work / "exchange")
        self.loop.dense = self.dense
        bits = job.settings.target
        if bits is not None:
            curves = known.get("curves") or probed(job, bits)
            options = job.settings.solver_options
            self.loop.rate = Controller(bits, [Curve(*c) for c in curves], options)
            self.loop.rate_after([self.finished[b.name] for b in self.blocks[: self.done]])

    def _settle_rest(self) -> list[str]:
        """Stores what is outside the blocks; returns the units that hold carried tensors."""
        if self.writer is None or _REST in self.finished:
            if self.dense is not None:
                self.dense.outside(None)
        else:
            with self.writer.block(_REST) as rest:
                coded = self.dense.outside(rest) if self.dense is not None else set()
                inside = tuple(f"{name}." for name, _ in self.job.streamed.block_lists)
                rest.add_tensors(
                    self.job.streamed.dense(lambda n: not n.startswith(inside) and n not in coded)
                )
                rest.note["own_words"] = unseen.of(self.job)
                if self.loop.rate is not None:
                    rest.note["curves"] = [c.as_list() for c in self.loop.rate.curves]
        if self.writer is None:
            return []
        return write_carried(self.writer, self.job.streamed, self.finished)

    def _run_blocks(self) -> None:
        """Quantizes the blocks that are not finished."""
        job, blocks = self.job, self.blocks
        job.streamed.free_head()
        self.loop.skip(blocks[: self.done])
        begin_walk(job.streamed, blocks[self.done :], job.world)
        hidden = not job.progress
        with tqdm(
            total=len(blocks), desc="blocks", unit="block", initial=self.done, disable=hidden
        ) as bar:
            for i, block in enumerate(blocks[self.done :], self.done):
                with self._continuable(blocks[i:]):
                    self._run_block(block, blocks[i + 1 : i + 2])
                bar.update()

    def _run_block(self, block: BlockRef, ahead: Sequence[BlockRef]) -> None:
        with ExitStack() as unit:
            target = unit.enter_context(self.writer.block(block.name)) if self.writer else None
            self.loop.block(block, target, ahead)
            self.job.world.meet("activations of a block")
            if self.first or self.job.world.apart:
                for kept in self.kept:
                    kept.settle()
        if self.first or self.job.world.apart:
            # neither the block nor activations before it are needed any more
            leave(self.job.streamed, block)
            for kept in self.kept:
                kept.keep_only(self.loop.last_blocks())

    def _finish(self, carried: Sequence[str]) -> None:
        """Stores an untied head and makes the directory visible."""
        if self.writer is None:
            return
        settings, streamed = self.job.settings, self.job.streamed
        last = [HEAD] if self.dense is not None and self.dense.has_head else []
        if self.dense is not None and last and HEAD not in self.finished:
            with self.writer.block(HEAD) as head:
                self.dense.head(self.loop.whole_walk(), head)
        config = _plain(streamed.config)
        # a model with code of its own is nothing without it
        code = ("*.py",) if config.get("auto_map") else ()
        files = carried_files(streamed.checkpoint.directory, code)
        if settings.with_code:
            more, config["auto_map"] = loading_code(streamed.config, type(streamed.model))
            files |= more
        self.writer.finish(
            [_REST, *carried, *(b.name for b in self.blocks), *last],
            config=config,
            settings={
                **settings.recorded(),
                "method": self.job.method.name,
                "ctx": settings.context(streamed.config),
            },
            versions=versions(),
            source={**streamed.checkpoint.origin, **self.identity["source"]},
            report=account(streamed),
            files=files,
        )

    @contextmanager
    def _continuable(self, blocks: Sequence[BlockRef]) -> Iterator[None]:
        """Ctrl-C inside says where the same command goes on; `blocks` are those that were not known
        to be finished.
        """
        try:
            yield
        except KeyboardInterrupt:
            left = [
                b.name for b in blocks if self.writer is None or not self.writer.recorded(b.name)
            ]
            where = f"continues at block {left[0]}" if left else "completes the checkpoint"
            raise InterruptedRunError(f"interrupted; the same command {where}") from None


def _plain(config: Any) -> dict[str, Any]:
    """The config as JSON values, without the place where the source lies."""
    out = plain_config(config)
    out.pop("_name_or_path", None)
    return out
