"""Quantizes a model block by block: runs the batches up to each experts module, has its experts
solved and stored, then runs the batches through the result.

Knows nothing about how runs begin, end or are resumed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.calib.batches import learnable
from qmoe.calib.lost import added, lost
from qmoe.calib.outputs import Outputs
from qmoe.calib.routing import BATCH, Parked, park, plugged
from qmoe.calib.walk import Walk
from qmoe.compression.dense import DenseCoder
from qmoe.compression.job import Job
from qmoe.compression.layer import Calibrated, groups, quantize_layer, run_layer
from qmoe.compression.rate import Controller, module_bits, offsets_bits
from qmoe.models.streamed import BlockRef
from qmoe.store.block import BlockWriter, EncodedBatch, ExpertsWriter
from qmoe.system import heap
from qmoe.types import ExpertsLayout

_REHEARSALS = 4
Plugs = list[tuple[nn.Module, Parked]]


class BlockLoop:
    """The state of one compression between blocks.

    Attributes:
        rate: picks the step of each layer where a number of bits is aimed at.
        dense: codes the matrices beside the experts; None leaves them as they are.
    """

    def __init__(
        self,
        job: Job,
        outputs: Sequence[Outputs],
        exchange: Path | None = None,
        unchanged: bool = False,
    ) -> None:
        """Args:
        job: the run.
        outputs: keep the activations: of the quantized stream, and if the method has drift
            correction, of the original one.
        exchange: folder in which processes exchange encoded batches; None encodes nothing.
        unchanged: nothing is solved, the experts run as they are.
        """
        self.job, self.exchange, self.unchanged = job, exchange, unchanged
        mine = job.world.mine(len(job.batches))
        self.walks = [Walk(job.streamed, job.batches, kept, mine) for kept in outputs]
        self.rate: Controller | None = None
        self.dense: DenseCoder | None = None

    def skip(self, done: Sequence[BlockRef]) -> None:
        """Marks blocks as finished: their outputs are read from where they are kept."""
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
        streamed = self.job.streamed
        encoded_names = streamed.encoded_names(block)
        streamed.load_block(block, encoded_names)
        inside = f"{block.name}."
        if self.dense is not None:
            coded = self.dense.block(block, self.whole_walk(), encoded_names, target)
            encoded_names = encoded_names | coded
        if target is not None:
            dense = streamed.dense(lambda n: n.startswith(inside) and n not in encoded_names)
            target.add_tensors(dense)
        plugs: list[Plugs] = [[] for _ in self.walks]
        for layout, module in streamed.experts_of(block):
            streams = self._park(block, layout, module, plugs)
            self._quantize(layout, module, streams, target)
            if streams[0].lost is not None:
                self.job.store.release(streams[0].lost)
            finished(layout)
        for following in ahead:
            streamed.prefetch_block(following)
        for walk, plugged_in in zip(self.walks, plugs, strict=True):
            with self._weights(walk), _plugged(walk, plugged_in):
                walk.run(block)
            for _, parked in plugged_in:
                parked.release(self.job.store)
        if self.dense is not None:
            self.dense.leave()
        streamed.free(block)
        heap.trim()

    def _park(
        self, block: BlockRef, layout: ExpertsLayout, module: nn.Module, plugs: list[Plugs]
    ) -> list[Calibrated]:
        """Runs every stream up to an experts module, past those of the block before it."""
        streams, store, world = [], self.job.store, self.job.world
        width = layout.projections[-1].rows
        for walk, plugged_in in zip(self.walks, plugs, strict=True):
            with self._weights(walk), _plugged(walk, plugged_in):
                parked = park(walk, block, layout.path, module, width, store, world)
            plugged_in.append((module, parked))
            first = sum(parked.rows[: len(parked.rows) - self.job.own])
            text = torch.arange(len(parked.hidden)) < first
            streams.append(Calibrated(parked, self._keep(block, parked), text))
        if len(streams) > 1:
            streams[0] = replace(streams[0], lost=self._lost(block, module, plugs[0]))
        return streams

    def _lost(self, block: BlockRef, module: nn.Module, plugs: Plugs) -> Tensor | None:
        """What the experts' answers are to make good besides what they are themselves."""
        job, walk, (*others, (_, parked)) = self.job, self.walks[0], plugs

        def factor() -> float:
            with self._weights(walk), _plugged(walk, others):
                return added(walk, block, module, parked)

        by = job.world.share(factor, f"answers of {block.name}")
        return lost(self.walks, block, parked, by, job.store, job.world) if by else None

    def whole_walk(self) -> Walk:
        """The quantized stream over all batches, whichever process this is."""
        walk = self.walks[0]
        if self.job.world.size == 1:
            return walk
        whole = Walk(self.job.streamed, self.job.batches, walk.outputs)
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
        streams: Sequence[Calibrated],
        target: BlockWriter | None,
    ) -> None:
        if self.unchanged:
            run_layer(self.job, layout, module, streams)
            return
        job = self.job
        delta = self._step(layout, module, streams)
        if self.rate is not None and delta is not None:
            job = replace(job, method=self.rate.method(delta))
        if self.exchange is None:
            quantize_layer(job, layout, module, streams, None)
            return
        alone = target is not None and job.world.size == 1
        writer = target.experts(layout) if target is not None else None
        put = writer.add_batch if writer is not None and alone else self._hand_over
        coverage = quantize_layer(job, layout, module, streams, put)
        if self.exchange is not None and job.world.apart:
            self._send(layout)
        report: dict[str, Any] = {}
        if target is not None and writer is not None:
            if not alone:
                self._gather(layout, writer)
            report = target.finish_experts(layout.path, coverage.tokens, coverage.notes)
        if self.rate is not None and delta is not None:
            took = job.world.share(lambda: module_bits(layout, report), f"bits of {layout.path}")
            self.rate.record(layout.path, took, delta)
            if target is not None:
                target.note[layout.path] = {"delta": delta, "bits": took}

    def _step(
        self, layout: ExpertsLayout, module: nn.Module, streams: Sequence[Calibrated]
    ) -> float | None:
        """The step that keeps the run on its target in bits, None without one.

        No later layer makes good what the last one takes too much: it is rehearsed until it fits.
        """
        if self.rate is None:
            return None
        delta = self.rate.delta()
        tries: dict[float, float] = {}
        while self.rate.ends_with(layout.path) and len(tries) < _REHEARSALS:
            tries[delta] = self._rehearsed(delta, layout, module, streams)
            better = self.rate.after(layout.path, tries)
            if better is None:
                break
            delta = better
        return delta

    def _rehearsed(
        self,
        delta: float,
        layout: ExpertsLayout,
        module: nn.Module,
        streams: Sequence[Calibrated],
    ) -> float:
        """Stored bits of a module at a step; nothing is kept of it."""
        assert self.rate is not None
        job = replace(self.job, method=self.rate.method(delta))
        bits: list[int] = []
        quantize_layer(
            job,
            layout,
            module,
            streams,
            lambda batch: bits.append(batch.encoded.stored_bits),
            f"{layout.path}, rehearsal",
        )
        # Sums of whole numbers: the same whichever process had which group.
        return offsets_bits(layout) + sum(job.world.collect(sum(bits), f"bits of {layout.path}"))

    def _hand_over(self, batch: EncodedBatch) -> None:
        """Leaves a batch where the first process finds it."""
        batch.save(self._place(batch.projection, batch.experts[0]))

    def _send(self, layout: ExpertsLayout) -> None:
        """Brings the batches of processes that are apart to where the first finds them."""
        world, left = self.job.world, list(groups(layout))
        mine: dict[tuple[str, int], bytes] = {}
        for i in world.mine(len(left)) if not world.first else ():
            for projection in layout.projections:
                path = self._place(projection.name, left[i].start)
                mine[projection.name, left[i].start] = path.read_bytes()
                path.unlink()
        for found in world.gather(mine, f"experts of {layout.path}"):
            for place, data in found.items():
                self._place(*place).write_bytes(data)

    def _gather(self, layout: ExpertsLayout, writer: ExpertsWriter) -> None:
        """Stores all processes' batches, in the order in which one process would have."""
        for group in groups(layout):
            for projection in layout.projections:
                path = self._place(projection.name, group.start)
                writer.add_batch(EncodedBatch.load(path))
                path.unlink()

    def _place(self, projection: str, first: int) -> Path:
        assert self.exchange is not None
        return self.exchange / f"{first}-{projection}"

    def _keep(self, block: BlockRef, parked: Parked) -> Tensor:
        """Which of the parked rows statistics are taken from; rows that are no tokens in order are
        all kept.
        """
        config = self.job.streamed.config
        decoder = config.is_encoder_decoder and "decoder" in block.list_name
        masks = learnable(self.job.batches, self.job.tokenizer, decoder)
        if parked.token is not None:
            return _kept(parked.token, masks)
        parts = []
        for rows, mask in zip(parked.rows, masks, strict=True):
            times = rows // len(mask)
            parts.append(
                mask.repeat(times)
                if times * len(mask) == rows
                else torch.ones(rows, dtype=torch.bool)
            )
        return torch.cat(parts)


def _kept(token: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """The masks of all batches, by the token of every row."""
    keep = torch.ones(len(token), dtype=torch.bool)
    for n, mask in enumerate(masks):
        rows = torch.nonzero(torch.div(token, BATCH, rounding_mode="floor") == n)[:, 0]
        keep[rows] = mask[token[rows] % BATCH]
    return keep


@contextmanager
def _plugged(walk: Walk, plugs: Plugs) -> Iterator[None]:
    with ExitStack() as stack:
        for module, parked in plugs:
            stack.enter_context(plugged(walk, module, parked))
        yield
