"""Block by block through a model that does not fit in memory, replaying the model's own forward.

No mask, position or rotary table is rebuilt here: every pass calls the model's forward, in which
finished blocks hand on their stored output, the current block runs, and an exception ends the pass.
The method follows the observation that the forward of every transformers model is the only complete
description of what its blocks receive.

Knows nothing about weights, solvers or experts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from qmoe.calib.outputs import Outputs, tree
from qmoe.models.auto import building
from qmoe.models.streamed import BlockRef, StreamedModel

Batch = dict[str, Tensor]


class _Stop(Exception):  # control flow: ends a forward after the current block
    pass


def stop_forward() -> None:
    """Ends the pass that is running, from inside a block (used to park a router's decisions)."""
    raise _Stop


class Walk:
    """Activations of every batch at the last finished block of each block list, for one stream of
    the model.

    Two walks over one model (the original's stream, the quantized one's) may be interleaved block
    by block.

    Attributes:
        batch: index of the batch that is running.
        finished: last finished block of every list, {list name: block name}.
        mine: the batches that this process runs, ascending.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        batches: Sequence[Batch],
        outputs: Outputs,
        mine: Sequence[int] | None = None,
    ) -> None:
        """Args: streamed, batches: model and inputs. outputs: keeps what blocks return. mine: the
        share of this process, by default all.
        """
        self.streamed, self.batches, self.outputs = streamed, batches, outputs
        self.mine = range(len(batches)) if mine is None else mine
        self.batch = 0
        self.finished: dict[str, str] = {}
        self._read: dict[str, Any] = {}  # stored outputs of the running batch, by list

    def run(self, block: BlockRef, keep: bool = True) -> None:
        """Runs every batch of this process through `block`, which must be resident.

        Args:
            block: the block after the last finished one of its list.
            keep: store the block's outputs, which makes it a finished block; otherwise they are
                dropped.
        """
        current: dict[str, Any] = {}
        with self._stubs(block, current), torch.no_grad():
            for n in self.mine:
                current["out"] = None
                with suppress(_Stop):
                    self._forward(n)
                if keep:
                    self.outputs.put(block.list_name, block.name, n, current["out"])
        self._read.clear()
        if keep:
            self.finished[block.list_name] = block.name

    def returned(self, block: BlockRef, batch: int) -> Any:
        """What `block`, resident and the next one of its list, returns for one batch; None where
        text does not come to it."""
        current: dict[str, Any] = {"out": None}
        with self._stubs(block, current), torch.no_grad(), suppress(_Stop):
            self._forward(batch)
        self._read.clear()
        return current["out"]

    def before(self, list_name: str, batch: int) -> Any:
        """What the last finished block of a list returned for one batch."""
        return self.outputs.get(list_name, self.finished[list_name], batch)

    def logits(self) -> Iterator[Tensor]:
        """The model's logits for every batch of this process once all blocks are finished."""
        for n in self.mine:
            with self._stubs(None, {}), torch.no_grad():
                yield self._forward(n).logits

    def _forward(self, batch: int) -> Any:
        self.batch = batch
        self._read.clear()
        inputs = {name: self._place(tensor) for name, tensor in self.batches[batch].items()}
        with building(str(self.streamed.checkpoint.directory), what="run"):
            return self.streamed.model(**inputs, use_cache=False)

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.streamed.device)

    def _stored(self, list_name: str) -> Any:
        if list_name not in self._read:  # every finished block of the list asks, with one answer
            block = self.finished[list_name]
            kept = self.outputs.get(list_name, block, self.batch)
            self._read[list_name] = tree(self._place, kept)
        return self._read[list_name]

    @contextmanager
    def _stubs(self, block: BlockRef | None, current: dict[str, Any]) -> Iterator[None]:
        blocks = list(self.streamed.blocks())

        def stub(b: BlockRef, real: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if block is None or b.module is not block.module:
                    if block is not None and b.list_name not in self.finished:
                        raise _Stop  # the list of `block` is no part of a text's forward
                    return self._stored(b.list_name)
                current["out"] = real(*args, **kwargs)
                raise _Stop

            return forward

        for b in blocks:
            b.module.forward = stub(b, b.module.forward)
        try:
            yield
        finally:
            for b in blocks:
                del b.module.forward  # the instance attribute; the class's method shows again
