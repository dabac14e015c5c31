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

from qmoe.calib.store import ActivationStore
from qmoe.host import BlockRef, Host

Batch = dict[str, Tensor]


class _Stop(Exception):  # control flow: it ends a forward after the current block
    pass


def stop_forward() -> None:
    """Ends the pass that is running, from inside a block (used to park a router's decisions)."""
    raise _Stop


class Walk:
    """Activations of every batch at the last finished block of each block list, for one stream of
    the model.

    Two walks over one host (the original model's stream and the quantized one's) may be interleaved
    block by block.
    """

    def __init__(self, host: Host, batches: Sequence[Batch], store: ActivationStore) -> None:
        self.host, self.batches, self.store = host, batches, store
        self.batch = 0  # index of the batch that is running
        self._saved: list[dict[str, Any]] = [{} for _ in batches]

    def run(self, block: BlockRef, keep: bool = True) -> None:
        """Runs every batch through `block`, which must be resident.

        Args:
            block: the block after the last finished one of its list.
            keep: store the block's outputs, which makes it a finished block; otherwise they are
                dropped.
        """
        current: dict[str, Any] = {}
        with self._stubs(block, current), torch.no_grad():
            for n, batch in enumerate(self.batches):
                self.batch, current["out"] = n, None
                with suppress(_Stop):
                    self.host.model(**self._inputs(batch), use_cache=False)
                if keep:
                    old = self._saved[n].get(block.list_name)
                    self._saved[n][block.list_name] = _tree(self.store.keep, current["out"])
                    _tree(self.store.release, old)

    def logits(self) -> Iterator[Tensor]:
        """The model's logits for every batch once all blocks are finished."""
        current: dict[str, Any] = {}
        for n, batch in enumerate(self.batches):
            with self._stubs(None, current), torch.no_grad():
                self.batch = n
                yield self.host.model(**self._inputs(batch), use_cache=False).logits

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.host.device)

    def _inputs(self, batch: Batch) -> Batch:
        return {name: self._place(tensor) for name, tensor in batch.items()}

    @contextmanager
    def _stubs(self, block: BlockRef | None, current: dict[str, Any]) -> Iterator[None]:
        blocks = list(self.host.blocks())

        def stub(b: BlockRef, real: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if block is None or b.module is not block.module:
                    saved = self._saved[self.batch]
                    if block is not None and b.list_name not in saved:
                        raise _Stop  # the list of `block` is no part of a text's forward
                    return _tree(self._place, saved[b.list_name])
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


def _tree(f: Callable[[Tensor], Any], value: Any) -> Any:
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, tuple | list):
        return type(value)(_tree(f, v) for v in value)
    return value
