"""The write path: source -> calibration -> solver -> codec -> container, one block of the model at
a time.

Peak memory: one block without its experts, one group of experts with its Hessians, and the
activations that `--memory` allows; never the model. docs/scale.md has the arithmetic and the
measurements.
"""

import hashlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer

from qmoe import __version__
from qmoe.block import BlockWriter
from qmoe.calib.experts import Parked, park, plugged
from qmoe.calib.store import ActivationStore
from qmoe.calib.tokens import inputs_only, learnable, prepare
from qmoe.calib.walk import Walk
from qmoe.checkpoint import open_checkpoint
from qmoe.container import ContainerWriter
from qmoe.dense import HEAD, DenseCoder
from qmoe.devices import pick_device
from qmoe.errors import QmoeError
from qmoe.evaluate import split_batches
from qmoe.families.base import ExpertsLayout
from qmoe.host import BlockRef, Host
from qmoe.layer import Stream, quantize_layer
from qmoe.quantize import Method, get_method
from qmoe.rate import Controller, Curve, Probe, check_target, module_bits, share_of
from qmoe.report import CompressReport

_BATCH_TOKENS = 4096  # tokens of one forward; fixed, since it decides the rounding of sums


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the output, and how the run may use the machine.

    Attributes:
        method: "rd", "qmoe", "rtn" or "gptq2" .. "gptq4".
        bits: stored bits per expert weight to hit, or None.
        delta: global step of rd, or None.
        dense_bits: stored bits per weight outside of the experts; 16 leaves it as it is.
        calib: calibration text.
        calib_tokens: at most this many tokens of it.
        ctx: tokens of a window, None for the model's own length, at most 2048.
        seed: of everything random.
        memory: bytes of activations kept in memory; more goes to mapped files.
        device: where solvers and forwards run.
        trust_remote_code: run the source's own model code.
        fresh: discard an unfinished run on the same output.
    """

    method: str
    calib: str
    calib_tokens: int = 131072
    bits: float | None = None
    delta: float | None = None
    dense_bits: int = 16
    ctx: int | None = None
    seed: int = 0
    memory: int = 4 * 2**30
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
    source: str, out: Path, settings: Settings, progress: bool = False
) -> CompressReport:
    """Compresses a checkpoint.

    Args:
        source: local directory or hub id.
        out: directory to make; it must not exist.
        settings: see `Settings`.
        progress: draw bars.

    Raises:
        QmoeError: the input's fault, see qmoe.errors; the source is never written to and `out`
            never half-made.
    """
    start = time.monotonic()
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
    identity = {"bytes": checkpoint.source_bytes, "fingerprint": checkpoint.fingerprint()}
    job = {**settings.recorded(), "source": identity, "calib_sha256": _digest(batches)}
    with ContainerWriter(out, job=job) as writer, ActivationStore(settings.memory) as store:
        run = _Run(host, method, batches, tokenizer, device, store, progress)
        host.load_rest()
        if settings.dense_bits < 16:
            run.dense = DenseCoder(host, settings.dense_bits, batches, tokenizer, device)
        inside = tuple(f"{name}." for name, _ in host.block_lists)
        with writer.block("rest") as rest:
            coded = run.dense.outside(rest) if run.dense is not None else set()
            outside = host.dense(lambda n: not n.startswith(inside) and n not in coded)
            for name, tensor in outside.items():
                rest.add_tensor(name, tensor)
            if settings.bits is not None:
                curves = run.probe(settings.bits)
                rest.note["curves"] = [c.as_list() for c in curves]
                run.rate = Controller(settings.bits, curves)
        names = ["rest"]
        for block in tqdm(list(host.blocks()), desc="blocks", unit="block", disable=not progress):
            with writer.block(block.name) as target:
                run.block(block, target)
            names.append(block.name)
        if run.dense is not None and run.dense.has_head:
            with writer.block(HEAD) as target:
                run.dense.head(run.quantized, target)
            names.append(HEAD)
        writer.finish(
            names,
            config=host.config.to_dict(),
            settings={**settings.recorded(), "method": method.name, "ctx": ctx},
            versions=_versions(),
            source={"name": Path(source).name, **identity},
            carry_from=checkpoint.directory,
        )
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
    name = settings.method
    params: dict[str, float] = {}
    if name.startswith("gptq"):
        name, params = "gptq", {"bits": int(settings.method.removeprefix("gptq"))}
    if name == "rd":
        if settings.bits is not None and settings.delta is not None:
            raise QmoeError("--bits and --delta exclude each other; give one of them")
        if settings.bits is not None:
            check_target(settings.bits)
        params = {} if settings.delta is None else {"delta": settings.delta}
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
    ) -> None:
        self.host, self.method, self.batches, self.tokenizer = host, method, batches, tokenizer
        self.device, self.store, self.progress = device, store, progress
        self.quantized = Walk(host, batches, store)
        self.original = Walk(host, batches, store) if method.drift > 0 else None
        self.rate: Controller | None = None
        self.dense: DenseCoder | None = None

    def probe(self, bits: float) -> list[Curve]:
        """Each module's bits as a function of the global step; see `qmoe.rate`."""
        tokens = sum(b["input_ids"].numel() for b in self.batches)
        some = share_of(self.batches, self.batches[0]["input_ids"].numel())
        seen = sum(b["input_ids"].numel() for b in some)
        probe = Probe(bits, tokens / seen)
        run = _Run(
            self.host, probe.method, some, self.tokenizer, self.device, self.store, self.progress
        )
        blocks = list(self.host.blocks())
        for block in tqdm(blocks, desc="probe", unit="block", disable=not self.progress):
            run.block(block, None, probe.finish)
        return probe.curves

    def block(
        self,
        block: BlockRef,
        target: BlockWriter | None,
        finished: Callable[[ExpertsLayout], None] = lambda layout: None,
    ) -> None:
        """Quantizes one block and moves both streams past it.

        Args:
            block: the block after the last one.
            target: where tensors and experts are stored; None stores nothing.
            finished: called after every experts module.
        """
        host = self.host
        encoded_names = host.encoded_names(block)
        host.load_block(block, encoded_names)
        inside = f"{block.name}."
        if self.dense is not None:
            encoded_names |= self.dense.block(block, self.quantized, encoded_names, target)
        if target is not None:
            dense = host.dense(lambda n: n.startswith(inside) and n not in encoded_names)
            for name, tensor in dense.items():
                target.add_tensor(name, tensor)
        walks = [w for w in (self.quantized, self.original) if w is not None]
        done: list[list[tuple[nn.Module, Parked]]] = [[] for _ in walks]
        for layout, module in host.experts_of(block):
            streams = []
            width = layout.projections[-1].rows
            for walk, plugs in zip(walks, done, strict=True):
                with self._weights(walk), _plugged(walk, plugs):
                    parked = park(walk, block, layout.path, module, width, self.store)
                plugs.append((module, parked))
                streams.append(Stream(parked, self._keep(block, parked)))
            self._quantize(layout, module, streams, target)
            finished(layout)
        for walk, plugs in zip(walks, done, strict=True):
            with self._weights(walk), _plugged(walk, plugs):
                walk.run(block)
            for _, parked in plugs:
                parked.release(self.store)
        if self.dense is not None:
            self.dense.leave()
        host.free(block)

    def _weights(self, walk: Walk) -> AbstractContextManager[None]:
        """Shows a stream the dense weights that are its own: decoded ones for the quantized."""
        if self.dense is None or walk is not self.quantized:
            return nullcontext()
        return self.dense.shown()

    def _quantize(
        self,
        layout: ExpertsLayout,
        module: nn.Module,
        streams: list[Stream],
        target: BlockWriter | None,
    ) -> None:
        original = streams[1] if len(streams) > 1 else None
        writer = target.experts(layout) if target is not None else None
        delta = self.rate.delta() if self.rate is not None else None
        method = self.method if delta is None else get_method("rd", delta=delta)
        with tqdm(
            total=layout.experts,
            desc=layout.path,
            unit="expert",
            leave=False,
            disable=not self.progress,
        ) as bar:
            coverage = quantize_layer(
                self.host,
                layout,
                module,
                method,
                streams[0],
                original,
                self.device,
                writer.add_group if writer is not None else lambda *_: None,
                bar.update,
            )
        if target is None:
            return
        report = target.finish_experts(layout.path, coverage.tokens, coverage.notes)
        if self.rate is not None and delta is not None:
            self.rate.record(layout.path, module_bits(layout, report), delta)
            target.note[layout.path] = {"delta": delta}

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
