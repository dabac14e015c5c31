"""Moves the calibration activations of two streams of a model past one block after another and has
the experts on the way quantized and stored.

Knows nothing about how runs begin, end or are resumed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qmoe.calib.activations import ActivationStore
from qmoe.calib.batches import learnable
from qmoe.calib.outputs import Outputs
from qmoe.calib.routing import Parked, park, plugged
from qmoe.calib.walk import Walk
from qmoe.codec import encode_group
from qmoe.compression.dense import DenseCoder
from qmoe.compression.layer import Calibrated, Coverage, OnSolved, groups, quantize_layer
from qmoe.compression.rate import Controller, module_bits, offsets_bits
from qmoe.models.streamed import BlockRef, StreamedModel
from qmoe.quantize import Method
from qmoe.store.block import BlockWriter, EncodedBatch, ExpertsWriter
from qmoe.system import heap
from qmoe.system.processes import World
from qmoe.types import ExpertsLayout, QuantizedMatrix

_REHEARSALS = 4


class BlockLoop:
    """The state of one compression between blocks.

    Attributes:
        rate: picks the step of each layer where a number of bits is aimed at.
        dense: codes the matrices beside the experts; None leaves them as they are.
        importance: of the layers, by module path; 1 where nothing is known.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        method: Method,
        batches: Sequence[dict[str, Tensor]],
        outputs: Sequence[Outputs],
        tokenizer: Any,
        device: torch.device,
        store: ActivationStore,
        progress: bool,
        world: World,
        pieces: Path | None,
    ) -> None:
        """Args:
        streamed: the streamed model, with everything outside its blocks resident.
        method: the solver.
        batches: calibration inputs.
        outputs: keep the activations: of the quantized stream, and if the method has drift
            correction, of the original one.
        tokenizer: knows which tokens are special.
        device: where solvers run.
        store: room for activations at experts.
        progress: draw bars.
        world: the processes that share the work.
        pieces: folder in which processes exchange encoded groups; None stores nothing at all.
        """
        self.streamed, self.method, self.batches, self.tokenizer = (
            streamed,
            method,
            batches,
            tokenizer,
        )
        self.device, self.store, self.progress = device, store, progress
        self.world, self.pieces = world, pieces
        mine = world.mine(len(batches))
        self.walks = [Walk(streamed, batches, kept, mine) for kept in outputs]
        self.rate: Controller | None = None
        self.dense: DenseCoder | None = None
        self.importance: dict[str, float] = {}

    def skip(self, done: Sequence[BlockRef]) -> None:
        """Puts the streams behind blocks whose outputs are kept already."""
        for walk in self.walks:
            walk.finished = {b.list_name: b.name for b in done}

    def last_blocks(self) -> list[str]:
        """The last finished block of every list."""
        return list(self.walks[0].finished.values())

    def rate_after(self, notes: Sequence[Mapping[str, Any]]) -> None:
        """Tells `rate` what finished blocks took, from the notes of their writers."""
        for note in notes:
            for path, module in note.items():
                if self.rate is not None:
                    self.rate.record(path, module["bits"], module["delta"])

    def block(
        self,
        block: BlockRef,
        target: BlockWriter | None,
        ahead: Sequence[BlockRef] = (),
        finished: Callable[[ExpertsLayout], None] = lambda layout: None,
    ) -> None:
        """Quantizes one block and moves all streams past it.

        Args:
            block: the block after the last one.
            target: where tensors and experts are stored, in the first process.
            ahead: blocks to read ahead while this one is completed.
            finished: called after every experts module.
        """
        streamed = self.streamed
        encoded_names = streamed.encoded_names(block)
        streamed.load_block(block, encoded_names)
        inside = f"{block.name}."
        if self.dense is not None:
            coded = self.dense.block(block, self.whole_walk(), encoded_names, target)
            encoded_names = encoded_names | coded
        if target is not None:
            dense = streamed.dense(lambda n: n.startswith(inside) and n not in encoded_names)
            target.add_tensors(dense)
        done: list[list[tuple[nn.Module, Parked]]] = [[] for _ in self.walks]
        for layout, module in streamed.experts_of(block):
            streams = []
            width = layout.projections[-1].rows
            for walk, plugs in zip(self.walks, done, strict=True):
                with self._weights(walk), _plugged(walk, plugs):
                    parked = park(walk, block, layout.path, module, width, self.store, self.world)
                plugs.append((module, parked))
                streams.append(Calibrated(parked, self._keep(block, parked)))
            self._quantize(layout, module, streams, target)
            finished(layout)
        for following in ahead:
            streamed.prefetch_block(following)
        for walk, plugs in zip(self.walks, done, strict=True):
            with self._weights(walk), _plugged(walk, plugs):
                walk.run(block)
            for _, parked in plugs:
                parked.release(self.store)
        if self.dense is not None:
            self.dense.leave()
        streamed.free(block)
        heap.trim()

    def whole_walk(self) -> Walk:
        """The quantized stream over all batches, whichever process this is."""
        walk = self.walks[0]
        if self.world.size == 1:
            return walk
        whole = Walk(self.streamed, self.batches, walk.outputs)
        whole.finished = walk.finished
        return whole

    def _weights(self, walk: Walk) -> AbstractContextManager[None]:
        """Shows a stream the dense weights that are its own: decoded ones for the quantized."""
        if self.dense is None or walk is not self.walks[0]:
            return nullcontext()
        return self.dense.shown()

    def _quantize(
        self,
        layout: ExpertsLayout,
        module: nn.Module,
        streams: list[Calibrated],
        target: BlockWriter | None,
    ) -> None:
        original = streams[1] if len(streams) > 1 else None
        writer = target.experts(layout) if target is not None else None

        def on_solved(projection: str, experts: range, matrices: list[QuantizedMatrix]) -> None:
            if self.pieces is not None:
                piece = EncodedBatch.of(projection, experts, matrices)
                if writer is not None and self.world.size == 1:
                    writer.add_batch(piece)
                else:
                    piece.save(self._piece(projection, experts))
            self.store.trim()

        def solve(method: Method, on_solved: OnSolved, what: str = layout.path) -> Coverage:
            with tqdm(
                total=layout.experts,
                desc=what,
                unit="expert",
                leave=False,
                disable=not self.progress,
            ) as bar:
                return quantize_layer(
                    self.streamed,
                    layout,
                    module,
                    method,
                    streams[0],
                    original,
                    self.device,
                    on_solved,
                    lambda experts: bar.update(experts * self.world.size),
                    self.world,
                    self.importance.get(layout.path, 1.0),
                )

        delta = self._step(layout, solve)
        method = self.method
        if self.rate is not None and delta is not None:
            method = self.rate.method(delta)
        coverage = solve(method, on_solved)
        if self.pieces is None:
            return
        if target is not None and writer is not None:
            if self.world.size > 1:
                self._gather(layout, writer)
            report = target.finish_experts(layout.path, coverage.tokens, coverage.notes)
            took = module_bits(layout, report)
        if self.rate is not None and delta is not None:
            took = self.world.share(lambda: took, f"bits of {layout.path}")
            self.rate.record(layout.path, took, delta)
            if target is not None:
                target.note[layout.path] = {"delta": delta, "bits": took}

    def _step(self, layout: ExpertsLayout, solve: Callable[..., Coverage]) -> float | None:
        """The step that keeps the run on its target in bits, None without one.

        No later layer makes good what the last one takes too much: it is rehearsed until it fits.
        """
        if self.rate is None:
            return None
        delta = self.rate.delta()
        tries: dict[float, float] = {}
        while self.rate.ends_with(layout.path) and len(tries) < _REHEARSALS:
            taken = [offsets_bits(layout)]

            def count(projection: str, experts: range, matrices: list[QuantizedMatrix]) -> None:
                taken.append(encode_group(matrices).stored_bits)  # noqa: B023 (called at once)
                self.store.trim()

            solve(self.rate.method(delta), count, f"{layout.path}, rehearsal")
            # Sums of whole numbers: the same whichever process had which group.
            shares = self.world.collect(sum(taken[1:]), f"bits of {layout.path}")
            tries[delta] = taken[0] + sum(shares)
            better = self.rate.after(layout.path, tries)
            if better is None:
                break
            delta = better
        return delta

    def _gather(self, layout: ExpertsLayout, writer: ExpertsWriter) -> None:
        """Stores all processes' groups, in the order in which one process would have."""
        for group in groups(layout):
            for projection in layout.projections:
                path = self._piece(projection.name, group)
                writer.add_batch(EncodedBatch.load(path))
                path.unlink()

    def _piece(self, projection: str, experts: range) -> Path:
        assert self.pieces is not None
        return self.pieces / f"{experts.start}-{projection}"

    def _keep(self, block: BlockRef, parked: Parked) -> Tensor:
        """Which of the parked rows statistics are taken from; rows that are no tokens in order are
        all kept.
        """
        config = self.streamed.config
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
