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
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer

from qmoe import __version__
from qmoe.block import BlockWriter, Piece
from qmoe.calib.experts import Parked, park, plugged
from qmoe.calib.state import Durable, resume_point
from qmoe.calib.store import ActivationStore
from qmoe.calib.tokens import inputs_only, learnable, prepare
from qmoe.calib.walk import Walk
from qmoe.checkpoint import open_checkpoint
from qmoe.container import ContainerWriter
from qmoe.devices import pick_device
from qmoe.durable import canonical_json
from qmoe.errors import InterruptedRunError, QmoeError
from qmoe.evaluate import split_batches
from qmoe.families.base import ExpertsLayout
from qmoe.host import BlockRef, Host
from qmoe.layer import Stream, groups, quantize_layer
from qmoe.parallel import World
from qmoe.plan import make_plan
from qmoe.quantize import Method, get_method
from qmoe.report import CompressReport
from qmoe.types import QuantizedMatrix

_BATCH_TOKENS = 4096  # tokens of one forward; fixed, since it decides the rounding of sums


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the output, and how the run may use the machine.

    Attributes:
        method: "rd", "qmoe", "rtn" or "gptq2" .. "gptq4".
        bits: stored bits per expert weight to hit, or None.
        delta: global step of rd, or None.
        calib: calibration text.
        calib_tokens: at most this many tokens of it.
        ctx: tokens of a window, None for the model's own length, at most 2048.
        seed: of everything random.
        memory: bytes that a process may use; what activations find no room for goes to mapped
            files.
        device: where solvers and forwards run.
        trust_remote_code: run the source's own model code.
        fresh: discard an unfinished run on the same output.
    """

    method: str
    calib: str
    calib_tokens: int = 131072
    bits: float | None = None
    delta: float | None = None
    ctx: int | None = None
    seed: int = 0
    memory: int = 8 * 2**30
    device: str = "auto"
    trust_remote_code: bool = False
    fresh: bool = False

    def recorded(self) -> dict[str, Any]:
        """The part that decides the bytes, for the manifest and for resuming."""
        out = asdict(self)
        for name in ("memory", "device", "trust_remote_code", "fresh"):
            del out[name]
        out["calib"] = Path(self.calib).name
        return out


def compress_checkpoint(
    source: str,
    out: Path,
    settings: Settings,
    progress: bool = False,
    world: World | None = None,
    say: Callable[[str], object] = lambda text: None,
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
    start = time.monotonic()
    world = world or World()
    device = pick_device(settings.device)
    method = _method(settings)
    checkpoint = open_checkpoint(source)
    host = Host(checkpoint, trust_remote_code=settings.trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory)
    ctx = _context(host.config, settings)
    data = prepare(
        tokenizer, host.config, settings.calib, settings.calib_tokens, ctx, settings.seed
    )
    batches = [inputs_only(b) for b in split_batches(data, _BATCH_TOKENS)]
    plan = make_plan(host, method, batches, settings.memory, out, settings.bits)
    if world.first:
        say(plan.text())
    identity = {"bytes": checkpoint.source_bytes, "fingerprint": checkpoint.fingerprint()}
    job = {
        **settings.recorded(),
        "source": identity,
        "calib_sha256": _digest(batches),
        "versions": _versions(),
        "device": device.type,
    }
    with ExitStack() as stack:
        writer = (
            stack.enter_context(ContainerWriter(out, job=job, resume=not settings.fresh))
            if world.first
            else None
        )
        work = world.share(lambda: writer.work if writer else Path(), "begin of the run")
        store = stack.enter_context(ActivationStore(plan.store, work, world))
        run = _Run(host, method, batches, tokenizer, device, store, progress, world, work, job)
        host.load_rest()
        blocks = list(host.blocks())
        rest_done, done = world.share(lambda: run.resume(writer, blocks, say), "what is finished")
        if writer and not rest_done:
            inside = tuple(f"{name}." for name, _ in host.block_lists)
            with writer.block("rest") as rest:
                for name, tensor in host.dense(lambda n: not n.startswith(inside)):
                    rest.add_tensor(name, tensor)
        host.free_head()
        run.go_on(blocks[:done])
        bar = tqdm(
            blocks,
            desc="blocks",
            unit="block",
            initial=done,
            disable=not (progress and world.first),
        )
        for i, block in enumerate(blocks[done:], done):
            try:
                with ExitStack() as unit:
                    target = unit.enter_context(writer.block(block.name)) if writer else None
                    run.block(block, target, blocks[i + 1 : i + 2])
            except KeyboardInterrupt:
                raise InterruptedRunError(
                    f"interrupted; the same command continues at block {block.name}"
                ) from None
            run.finished()
            bar.update()
        bar.close()
        if writer:
            writer.finish(
                ["rest", *(b.name for b in blocks)],
                config=host.config.to_dict(),
                settings={**settings.recorded(), "method": method.name, "ctx": ctx},
                versions=_versions(),
                source={"name": Path(source).name, **identity},
                carry_from=checkpoint.directory,
            )
        world.meet("end of the run")
    return CompressReport.of(out, time.monotonic() - start, peak_rss_bytes())


def _digest(batches: list[dict[str, Tensor]]) -> str:
    """sha256 of the calibration tokens."""
    h = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            h.update(batch[name].long().numpy().tobytes())
    return h.hexdigest()


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "safetensors", "numpy", "numba")
    return {"qmoe": __version__, **{n: metadata.version(n) for n in names}}


def _context(config: Any, settings: Settings) -> int:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None) or 2048
    return settings.ctx or min(longest, 2048)


def _method(settings: Settings) -> Method:
    name, params = settings.method, {}
    if name.startswith("gptq"):
        name, params = "gptq", {"bits": int(settings.method.removeprefix("gptq"))}
    if name == "rd":
        params = {"delta": settings.delta or 8.0}
    elif settings.bits is not None or settings.delta is not None:
        raise QmoeError(
            f"--method {settings.method} has a fixed grid; --bits and --delta belong to --method rd"
        )
    return get_method(name, **params)


def peak_rss_bytes() -> int:
    """Peak resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Run:
    """The state of one compression between blocks: two streams of activations and the reports."""

    def __init__(
        self,
        host: Host,
        method: Method,
        batches: list[dict[str, Tensor]],
        tokenizer: Any,
        device: torch.device,
        store: ActivationStore,
        progress: bool,
        world: World,
        work: Path,
        job: dict[str, Any],
    ) -> None:
        self.host, self.method, self.batches, self.tokenizer = host, method, batches, tokenizer
        self.device, self.store, self.progress, self.world = device, store, progress, world
        self.pieces = work / "pieces"
        names = ["quantized", "original"] if method.drift > 0 else ["quantized"]
        identity = hashlib.sha256(canonical_json(job)).hexdigest()
        self.kept = [Durable(work / "state" / name, f"{identity} {name}") for name in names]
        mine = world.mine(len(batches))
        self.walks = [Walk(host, batches, kept, mine) for kept in self.kept]

    def resume(
        self, writer: ContainerWriter | None, blocks: list[BlockRef], say: Callable[[str], object]
    ) -> tuple[bool, int]:
        """(whether everything outside the blocks is written, number of blocks to go on after)."""
        if writer is None:
            return False, 0
        for left in writer.work.iterdir():  # of a run that died
            if left.name != "state":
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        self.pieces.mkdir()
        finished = writer.finished_blocks()
        names = [(b.list_name, b.name) for b in blocks]
        done, had = resume_point(names, finished, self.kept, len(self.batches))
        if had and done < had:
            say(
                f"{had} blocks are finished, but the activations behind {names[had - 1][1]} are "
                f"missing or damaged; going back to block {names[done][1]}"
            )
        elif done:
            where = f"continuing at block {names[done][1]}" if done < len(names) else "completing"
            say(f"{done} of {len(names)} blocks are finished; {where}")
        return "rest" in finished, done

    def go_on(self, done: list[BlockRef]) -> None:
        """Puts the streams behind the last finished block."""
        for walk in self.walks:
            walk.finished = {b.list_name: b.name for b in done}

    def finished(self) -> None:
        """The record of the block is durable: activations before it are not needed any more."""
        if self.world.first:
            for walk, kept in zip(self.walks, self.kept, strict=True):
                kept.keep_only(list(walk.finished.values()))

    def block(self, block: BlockRef, target: BlockWriter | None, after: list[BlockRef]) -> None:
        """Quantizes one block into `target` (in the first process) and moves both streams past it,
        durably.
        """
        host = self.host
        encoded_names = host.encoded_names(block)
        host.load_block(block, encoded_names)
        if target:
            inside = f"{block.name}."
            for name, tensor in host.dense(
                lambda n: n.startswith(inside) and n not in encoded_names
            ):
                target.add_tensor(name, tensor)
        done: list[list[tuple[nn.Module, Parked]]] = [[] for _ in self.walks]
        for layout, module in host.experts_of(block):
            streams = []
            width = layout.projections[-1].rows
            for walk, plugs in zip(self.walks, done, strict=True):
                with _plugged(walk, plugs):
                    parked = park(walk, block, layout.path, module, width, self.store, self.world)
                plugs.append((module, parked))
                streams.append(Stream(parked, self._keep(block, parked)))
            self._quantize(layout, module, streams, target)
        for ahead in after:
            host.prefetch_block(ahead)
        for walk, plugs in zip(self.walks, done, strict=True):
            with _plugged(walk, plugs):
                walk.run(block)
            for _, parked in plugs:
                parked.release(self.store)
        host.free(block)
        self.world.meet(f"end of block {block.name}")
        if self.world.first:
            for kept in self.kept:
                kept.settle()

    def _quantize(
        self,
        layout: ExpertsLayout,
        module: nn.Module,
        streams: list[Stream],
        target: BlockWriter | None,
    ) -> None:
        original = streams[1] if len(streams) > 1 else None
        writer = target.experts(layout) if target else None

        def sink(projection: str, experts: range, matrices: list[QuantizedMatrix]) -> None:
            piece = Piece.of(projection, experts, matrices)
            if writer and self.world.size == 1:
                writer.add_piece(piece)
            else:
                piece.save(self._piece(projection, experts))
            self.store.trim()

        with tqdm(
            total=layout.experts,
            desc=layout.path,
            unit="expert",
            leave=False,
            disable=not (self.progress and self.world.first),
        ) as bar:
            coverage = quantize_layer(
                self.host,
                layout,
                module,
                self.method,
                streams[0],
                original,
                self.device,
                sink,
                lambda experts: bar.update(min(experts * self.world.size, bar.total - bar.n)),
                self.world,
            )
        if target and writer:
            if self.world.size > 1:  # in the order in which one process would have written them
                for group in groups(layout):
                    for projection in layout.projections:
                        path = self._piece(projection.name, group)
                        writer.add_piece(Piece.load(path))
                        path.unlink()
            target.finish_experts(layout.path, coverage.tokens, coverage.notes)

    def _piece(self, projection: str, experts: range) -> Path:
        return self.pieces / f"{experts.start}-{projection}"

    def _keep(self, block: BlockRef, parked: Parked) -> Tensor:
        """Which of the parked rows statistics are taken from; rows that are no tokens in order are
        all kept.
        """
        config = self.host.config
        decoder = config.is_encoder_decoder and "decoder" in block.list_name
        masks = learnable(self.batches, self.tokenizer, decoder)
        parts = []
        for rows, mask in zip(parked.rows, masks, strict=True):
            times = rows // len(mask)
            parts.append(
                mask.repeat(times)
                if times * len(mask) == rows
                else torch.ones(rows, dtype=torch.bool)
            )
        return torch.cat(parts)


@contextmanager
def _plugged(walk: Walk, plugs: list[tuple[nn.Module, Parked]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, parked in plugs:
            stack.enter_context(plugged(walk, module, parked))
        yield
