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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from qmoe.calib import default_text
from qmoe.calib.activations import ActivationStore
from qmoe.calib.batches import inputs_only, prepare, split_batches
from qmoe.calib.importance import fits, layer_importance
from qmoe.calib.outputs import Durable, Outputs, resume_point
from qmoe.compression.blocks import Run
from qmoe.compression.carried import account, write_carried
from qmoe.compression.dense import HEAD, DenseCoder
from qmoe.compression.plan import make_plan
from qmoe.compression.probe import probed
from qmoe.compression.rate import Controller, Curve, check_target, missed
from qmoe.compression.report import CompressReport
from qmoe.errors import InterruptedRunError, QmoeError
from qmoe.models.classes import plain_config, read_tokenizer
from qmoe.models.downloads import begin_walk, leave
from qmoe.models.streamed import BlockRef, Host
from qmoe.quantize import Method, get_method
from qmoe.source.checkpoint import open_checkpoint
from qmoe.store.writer import ContainerWriter, downloads_of
from qmoe.system.files import canonical_json
from qmoe.system.machine import pick_device
from qmoe.system.processes import World
from qmoe.version import __version__

_BATCH_TOKENS = 4096  # tokens of one forward; fixed, since it decides the rounding of sums
Say = Callable[[str], object]
Batches = Sequence[dict[str, Tensor]]


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the output, and how the run may use the machine.

    Attributes:
        method: "rd", "qmoe", "rtn" or "gptq2" .. "gptq4".
        bits: stored bits per expert weight to hit, or None.
        delta: global step of rd, or None.
        dense_bits: stored bits per weight outside of the experts; 16 leaves it as it is.
        calib: calibration text; None is the one that comes with the package.
        calib_tokens: at most this many tokens of it.
        calib_rows: how its documents are read: `pack`, `chat`, `column` of qmoe.calib.text.windows.
        ctx: tokens of a window, None for the model's own length, at most 2048.
        seed: of everything random.
        knobs: of rd, for experiments: parameters of `qmoe.quantize.rd.method` but `delta`, and
            `gradient`, 0 for layers that count alike.
        memory: bytes that a process may use; what activations find no room for goes to mapped
            files.
        source_cache: "keep" or "drop" downloaded source files when no block needs them any more.
        device: where solvers and forwards run.
        trust_remote_code: run the source's own model code.
        fresh: discard an unfinished run on the same output.
    """

    method: str
    calib: str | None = None
    calib_tokens: int = 131072
    calib_rows: Mapping[str, Any] = field(default_factory=dict)
    bits: float | None = None
    delta: float | None = None
    dense_bits: int = 16
    ctx: int | None = None
    seed: int = 0
    knobs: Mapping[str, float] = field(default_factory=dict)
    memory: int = 8 * 2**30
    source_cache: str = "keep"
    device: str = "auto"
    trust_remote_code: bool = False
    fresh: bool = False

    def solver_knobs(self) -> dict[str, float]:
        """The knobs that the solver has."""
        return {name: value for name, value in self.knobs.items() if name != "gradient"}

    def recorded(self) -> dict[str, Any]:
        """The part that decides the bytes, for the manifest and for resuming."""
        out = asdict(self)
        for name in ("memory", "source_cache", "device", "trust_remote_code", "fresh"):
            del out[name]
        if not self.calib_rows:
            del out["calib_rows"]
        out["calib"] = default_text.NAME if self.calib is None else Path(self.calib).name
        return out


def compress_checkpoint(
    source: str,
    out: Path,
    settings: Settings,
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
    start = time.monotonic()
    world = world or World()
    if not world.first:
        progress, say = False, lambda text: None
    device = pick_device(settings.device)
    method = _method(settings)
    cache = downloads_of(out) if settings.source_cache == "drop" else None
    checkpoint = open_checkpoint(source, cache=cache)
    host = Host(checkpoint, trust_remote_code=settings.trust_remote_code, device=device)
    tokenizer = read_tokenizer(checkpoint.directory, settings.trust_remote_code)
    ctx = _context(host.config, settings)
    text = (settings.calib, settings.calib_tokens, ctx, settings.seed)
    data = prepare(tokenizer, host.config, *text, **settings.calib_rows)
    batches = [inputs_only(b) for b in split_batches(data, _BATCH_TOKENS)]
    wanted = settings.method == "rd" and bool(settings.knobs.get("gradient", True))
    by_gradient = wanted and fits(host, settings.memory)
    dense: DenseCoder | None = None
    if settings.dense_bits < 16:
        dense = DenseCoder(host, settings.dense_bits, batches, tokenizer, device)
    goal = (settings.memory, out, settings.bits, dense, by_gradient, world.size)
    plan = make_plan(host, method, batches, *goal)
    say(plan.text())
    if settings.calib is None:
        say(default_text.describe(tokenizer, settings.calib_tokens, data["input_ids"].numel()))
    if wanted and not by_gradient:
        say("layers count alike: the gradients of the whole model do not fit in --memory")
    identity = {"bytes": checkpoint.source_bytes, "fingerprint": checkpoint.fingerprint()}
    job = {
        **settings.recorded(),
        "source": identity,
        "calib_sha256": _digest(batches),
        "versions": _versions(),
        "device": device.type,
        "layer_weights": "gradient" if by_gradient else "equal",
    }
    blocks = list(host.blocks())
    with ExitStack() as stack:
        writer = None
        if world.first:
            writer = ContainerWriter(out, job=job, resume=not settings.fresh)
            stack.enter_context(writer)
        work = world.share(lambda: _clean(writer), "begin of the run")
        store = stack.enter_context(ActivationStore(plan.store, work))
        run_id = hashlib.sha256(canonical_json(job)).hexdigest()
        names = ["quantized", "original"] if method.drift > 0 else ["quantized"]
        kept = [Durable(work / "state" / name, f"{run_id} {name}") for name in names]

        def make_run(solver: Method, some: Batches, outputs: Sequence[Outputs], part: World) -> Run:
            pieces = work / "pieces" if outputs is kept else None
            made = Run(
                host, solver, some, outputs, tokenizer, device, store, progress, part, pieces
            )
            made.importance = importance
            return made

        host.load_rest()
        world.meet("what is outside the blocks")  # nobody needs its files any more
        finished, done = world.share(
            lambda: _progress(writer, blocks, kept, len(batches), say), "what is finished"
        )
        try:
            importance: dict[str, float] = {}
            if by_gradient:
                importance = finished.get("rest", {}).get("importance") or world.share(
                    lambda: layer_importance(host, batches), "importance of the layers"
                )
            run = make_run(method, batches, kept, world)
            if settings.bits is not None:
                knobs = settings.solver_knobs()
                curves = finished.get("rest", {}).get("curves") or probed(
                    host, blocks, batches, settings.bits, knobs, store, make_run, world, progress
                )
                run.rate = Controller(settings.bits, [Curve(*c) for c in curves], knobs)
                run.rate_after([finished[b.name] for b in blocks[:done]])
            run.dense = dense
            if writer and "rest" not in finished:
                with writer.block("rest") as rest:
                    coded = run.dense.outside(rest) if run.dense else set()
                    inside = tuple(f"{name}." for name, _ in host.block_lists)
                    outside = host.dense(lambda n: not n.startswith(inside) and n not in coded)
                    rest.add_tensors(outside)
                    rest.note["importance"] = importance
                    if run.rate is not None:
                        rest.note["curves"] = [c.as_list() for c in run.rate.curves]
            elif run.dense:
                run.dense.outside(None)
            carried = write_carried(writer, host, finished) if writer else []
        except KeyboardInterrupt:
            raise _interrupted(writer, blocks[done:]) from None
        host.free_head()
        run.go_on(blocks[:done])
        begin_walk(host, blocks[done:], world)
        with tqdm(
            total=len(blocks), desc="blocks", unit="block", initial=done, disable=not progress
        ) as bar:
            for i, block in enumerate(blocks[done:], done):
                try:
                    with ExitStack() as unit:
                        target = unit.enter_context(writer.block(block.name)) if writer else None
                        run.block(block, target, blocks[i + 1 : i + 2])
                        _settle(kept, world)
                    if world.first:  # neither it nor activations before it are needed any more
                        leave(host, block)
                        for k in kept:
                            k.keep_only(list(run.last_blocks()))
                except KeyboardInterrupt:
                    raise _interrupted(writer, blocks[i:]) from None
                bar.update()
        last = [HEAD] if run.dense and run.dense.has_head else []
        if writer:
            if run.dense and last and HEAD not in finished:
                with writer.block(HEAD) as head:
                    run.dense.head(run.whole_walk(), head)
            writer.finish(
                ["rest", *carried, *(b.name for b in blocks), *last],
                config=_plain(host.config),
                settings={**settings.recorded(), "method": method.name, "ctx": ctx},
                versions=_versions(),
                source={**checkpoint.origin, **identity},
                report=account(host),
                carry_from=checkpoint.directory,
            )
        world.meet("end of the run")
    report = CompressReport.of(out, time.monotonic() - start, peak_rss_bytes())
    if settings.bits is not None and (
        sentence := missed(settings.bits, report.sizes["bits_per_weight"])
    ):
        say(sentence)
    return report


def _clean(writer: ContainerWriter | None) -> Path:
    """The folder of the run's own files, without what a run that died left, except its state."""
    assert writer is not None
    for left in writer.work.iterdir():
        if left.name != "state":
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    (writer.work / "pieces").mkdir()
    return writer.work


def _progress(
    writer: ContainerWriter | None,
    blocks: Sequence[BlockRef],
    kept: Sequence[Durable],
    batches: int,
    say: Say,
) -> tuple[dict[str, Any], int]:
    """Notes of the finished blocks, and how many blocks of the model to go on after."""
    assert writer is not None
    finished = writer.finished_blocks()
    names = [(b.list_name, b.name) for b in blocks]
    done, had = resume_point(names, finished, kept, batches)
    if "rest" not in finished:
        return finished, 0
    if done < had:
        say(
            f"{had} blocks are finished, but the activations behind {names[had - 1][1]} are "
            f"missing or damaged; going back to block {names[done][1]}"
        )
    elif done:
        then = f"continuing at block {names[done][1]}" if done < len(names) else "completing"
        say(f"{done} of {len(names)} blocks are finished; {then}")
    return finished, done


def _interrupted(writer: ContainerWriter | None, blocks: Sequence[BlockRef]) -> InterruptedRunError:
    """What ctrl-C ends a run with; `blocks` are those that were not known to be finished."""
    left = [b.name for b in blocks if writer is None or not writer.recorded(b.name)]
    where = f"continues at block {left[0]}" if left else "completes the checkpoint"
    return InterruptedRunError(f"interrupted; the same command {where}")


def _settle(kept: Sequence[Durable], world: World) -> None:
    """Returns when the activations of all processes are durable."""
    world.meet("activations of a block")
    if world.first:
        for k in kept:
            k.settle()


def _plain(config: Any) -> dict[str, Any]:
    """The config as JSON values, without the place where the source lies."""
    out = plain_config(config)
    out.pop("_name_or_path", None)
    return out


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
    name = settings.method
    params: dict[str, float] = {}
    if name.startswith("gptq"):
        name, params = "gptq", {"bits": int(settings.method.removeprefix("gptq"))}
    if name == "rd":
        if settings.bits is not None and settings.delta is not None:
            raise QmoeError("--bits and --delta exclude each other; give one of them")
        if settings.bits is not None:
            check_target(settings.bits)
        params = settings.solver_knobs()
        if settings.delta is not None:
            params["delta"] = settings.delta
    elif settings.knobs:
        raise QmoeError(f"--method {settings.method} has no knobs, got {dict(settings.knobs)}")
    elif settings.bits is not None or settings.delta is not None:
        raise QmoeError(
            f"--method {settings.method} has a fixed grid; --bits and --delta belong to --method rd"
        )
    try:
        return get_method(name, **params)
    except (TypeError, ValueError) as e:
        raise QmoeError(f"{name} does not take {params}: {e}") from e


def peak_rss_bytes() -> int:
    """Peak resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
