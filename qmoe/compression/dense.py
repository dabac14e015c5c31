"""``--dense-bits``: everything outside of the experts that is a large matrix, coded at a chosen
number of stored bits per weight.

That is the weight of every Linear inside the blocks except routers and gates, the input embeddings
and the head. A block's matrices are coded before its experts, so that the experts are fitted to
what attention will really send them; the original stream (drift correction) keeps the originals.

Memory: the float32 originals and decoded values of one block without its experts and of the
embeddings; Hessians of one block, one for each distinct input; integers of one band.
"""

import math
import re
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.calib.batches import learnable
from qmoe.calib.routing import second_moment
from qmoe.calib.walk import Walk
from qmoe.codec.format.geometry import MAX_COLS
from qmoe.compression.coding import encode_planes, trial_bits
from qmoe.compression.job import Job
from qmoe.errors import NonFiniteError
from qmoe.models.families.find import route
from qmoe.models.streamed import BlockRef
from qmoe.models.ties import tied_names
from qmoe.quantize.dense import DenseSolver
from qmoe.store.block import BlockWriter
from qmoe.store.stored_dense import DenseGeometry
from qmoe.types import QuantizedMatrix

HEAD = "head"  # name of the unit of the container that holds an untied head
_LEAST, _NARROWEST = 1 << 12, 16  # weights; rows or columns: below, side data would outweigh
BAND = 1 << 22  # weights of a band
_DIGITS = 3  # of a rate; further ones mean nothing
_ENTRY = 65  # bytes that a tensor's entry in the header of its file takes beside its name
_SAMPLE = 1 << 20  # weights on which a step is sought
_TOLERANCE, _TRIES = 0.003, 8  # share of the bits; steps tried
_ROUTER = re.compile(r"(^|[._])(router|gate|classifier|wg)([._]|$)")


class DenseCoder:
    """Codes dense matrices as a run comes to them, and shows the decoded values where asked."""

    def __init__(self, job: Job, bits: float) -> None:
        """Args:
        job: its model with everything outside its blocks resident; its batches are those of the
            walks that are passed to the methods.
        bits: stored bits per weight of every matrix: a split by what the loss feels was no better
            (docs/log-quant.md).
        """
        self.streamed, self.device = job.streamed, job.device
        self.bits = round(bits, _DIGITS)
        self.learn_from(job)
        self._outside: list[tuple[Tensor, Tensor]] = []
        self._inside: list[tuple[Tensor, Tensor]] = []
        self._tied = {name for name, _ in tied_names(self.streamed.model)}

    def learn_from(self, job: Job) -> None:
        """Takes the tokens of a job's batches as those of the walks to come."""
        self._tokens = {False: learnable(job.batches, job.tokenizer, decoder=False)}
        if self.streamed.config.is_encoder_decoder:
            self._tokens[True] = learnable(job.batches, job.tokenizer, decoder=True)

    def names(self) -> set[str]:
        """Parameters that will be coded; nothing has to be loaded."""
        table = self.streamed.model.get_input_embeddings().weight
        name, head = self._name(table), self._head()
        out = {name} if name is not None and self._worth(table) else set()
        if head is not None:
            out.add(head[0])
        for block in self.streamed.blocks():
            out |= dict(self._linears(block, self.streamed.encoded_names(block))).keys()
        return out

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While the context is open, the resident parameters have their decoded values."""
        with torch.no_grad(), ExitStack() as stack:
            for parameter, decoded in (*self._outside, *self._inside):
                original = parameter.data
                parameter.data = decoded
                stack.callback(setattr, parameter, "data", original)
            yield

    def outside(self, target: BlockWriter | None) -> set[str]:
        """Codes the input embeddings, tied heads with them.

        Args:
            target: where they are stored; None stores nothing.

        Returns:
            Names of all parameters outside the blocks that this coder stores, an untied head
            (see `head`) included.
        """
        table = self.streamed.model.get_input_embeddings().weight
        name = self._name(table)
        out = set()
        if name is not None and self._worth(table):
            self._outside = [(table, self._code(name, table, None, target))]
            out.add(name)
        head = self._head()
        return out if head is None else {*out, head[0]}

    @property
    def has_head(self) -> bool:
        """Whether there is an untied head to be coded behind the last block."""
        return self._head() is not None

    def head(self, walk: Walk, target: BlockWriter | None) -> None:
        """Codes the untied head with the Hessian of the final hidden states.

        Args:
            walk: the quantized stream behind the last block.
            target: where it is stored.
        """
        found = self._head()
        if found is None:
            raise ValueError("the model has no head of its own")
        name, module = found
        if module.weight.is_meta:
            self.streamed.load(lambda n: n == name)
        moments = self._moments(walk, self.streamed.config.is_encoder_decoder)

        def forward(x: Tensor) -> Tensor:  # the logits themselves are not needed
            moments.add(module, x)
            return x.new_zeros(*x.shape[:-1], 1)

        module.forward = forward  # type: ignore[method-assign,assignment]
        try:
            with self.shown():
                for _ in walk.logits():
                    pass
        finally:
            del module.forward
        self._code(name, module.weight, moments.of(module), target)

    def block(
        self,
        block: BlockRef,
        walk: Walk,
        encoded: Container[str],
        target: BlockWriter | None,
    ) -> set[str]:
        """Codes a resident block's matrices; until `leave`, `shown` shows them, too.

        Args:
            block: the block after the last one of `walk`.
            walk: the quantized stream.
            encoded: names of the parameters that are experts' matrices.
            target: where the matrices are stored.

        Returns:
            Names of the parameters that were coded.
        """
        linears = dict(self._linears(block, encoded))
        if not linears:
            return set()
        moments = self._moments(walk, "decoder" in block.list_name)
        with ExitStack() as stack:
            for layout, module in self.streamed.experts_of(block):
                module.forward = _silent(module, layout.projections[-1].rows)
                stack.callback(delattr, module, "forward")
            for module in linears.values():
                hook = module.register_forward_pre_hook(
                    lambda m, args, kwargs: moments.add(m, args[0] if args else kwargs["input"]),
                    with_kwargs=True,
                )
                stack.callback(hook.remove)
            stack.enter_context(self.shown())
            walk.run(block, keep=False)
        for name, module in linears.items():
            hessian = moments.of(module)
            decoded = self._code(name, module.weight, hessian, target)
            self._inside.append((module.weight, decoded))
        return set(linears)

    def _moments(self, walk: Walk, decoder: bool) -> "_Moments":
        """Sums for a part of the model; its own kind of tokens is tried first."""
        kinds = sorted(self._tokens, key=lambda kind: kind != decoder)
        return _Moments(walk, [self._tokens[kind] for kind in kinds], self.device)

    def leave(self) -> None:
        """Forgets the block's matrices."""
        self._inside = []

    def _linears(self, block: BlockRef, encoded: Container[str]) -> Iterator[tuple[str, nn.Linear]]:
        experts = tuple(f"{layout.path}." for layout, _ in self.streamed.experts_of(block))
        for path, module in block.module.named_modules():
            name = f"{block.name}.{path}.weight"
            if (
                isinstance(module, nn.Linear)
                and name not in encoded
                and name not in self._tied
                and not name.startswith(experts or "\0")
                and not _ROUTER.search(path)
                and self._worth(module.weight)
            ):
                yield name, module

    def _head(self) -> tuple[str, nn.Linear] | None:
        """An untied head and the name of its weight."""
        module = self.streamed.model.get_output_embeddings()
        if not isinstance(module, nn.Linear) or not self._worth(module.weight):
            return None
        if module.weight is self.streamed.model.get_input_embeddings().weight:
            return None
        name = self._name(module.weight)
        return None if name is None else (name, module)

    def _name(self, parameter: Tensor) -> str | None:
        """Under which name a parameter is stored: of its names the one that is no tied copy."""
        named: Iterator[tuple[str, Tensor]] = self.streamed.model.named_parameters(
            remove_duplicate=False
        )
        for name, found in named:
            if found is parameter and name not in self._tied:
                return name
        return None

    def _worth(self, weight: Tensor) -> bool:
        rows, cols = weight.shape
        return weight.numel() >= _LEAST and min(rows, cols) >= _NARROWEST and cols <= MAX_COLS

    @torch.no_grad()
    def _code(
        self, name: str, weight: Tensor, hessian: Tensor | None, target: BlockWriter | None
    ) -> Tensor:
        """Codes one matrix and returns its decoded values."""
        if hessian is not None and not torch.isfinite(hessian).all():
            raise NonFiniteError(f"{name}: the Hessian of its inputs overflowed")
        solver = DenseSolver(weight.float().to(self.device), hessian, self.bits)
        rows, cols = weight.shape
        bands = -(-weight.numel() // BAND)
        geometry = DenseGeometry(name, rows, cols, -(-rows // min(bands, rows)), solver.planes)
        delta = find_step(solver, geometry, self.bits)
        decoded = torch.empty_like(weight.data)

        def solve() -> Iterator[list[QuantizedMatrix]]:
            for band in geometry.bands:
                planes = solver.solve(slice(band.start, band.stop), delta)
                total = planes[0].dequantize()
                for plane in planes[1:]:
                    total += plane.dequantize()
                decoded[band.start : band.stop] = total.to(decoded)
                yield planes

        if target is None:
            for _ in solve():
                pass
        else:
            sizes = ((len(band), cols) for band in geometry.bands)
            coded = (encode_planes(p, size) for p, size in zip(solve(), sizes, strict=True))
            target.add_dense(geometry, coded, delta=delta, note=solver.note)
        return decoded


def find_step(solver: DenseSolver, geometry: DenseGeometry, bits: float) -> float:
    """The global step at which a matrix takes `bits` stored bits per weight, by secants on a sample
    of its rows: bits fall by about one with every doubling.
    """
    count = min(geometry.rows, max(1, _SAMPLE // geometry.cols))
    rows = torch.arange(count) * geometry.rows // count
    at = math.log2(solver.first_step())
    tried: list[tuple[float, float]] = []
    for _ in range(_TRIES):
        miss = _stored_bits(solver, geometry, rows, 2.0**at) - bits
        tried.append((at, miss))
        if abs(miss) < _TOLERANCE * bits:
            break
        slope = -1.0
        if len(tried) > 1:
            (x0, y0), (x1, y1) = tried[-2:]
            slope = (y1 - y0) / (x1 - x0) if x1 != x0 else -1.0
        at -= miss / min(max(slope, -2.0), -0.25)
    return float(2.0 ** min(tried, key=lambda t: abs(t[1]))[0])


def _stored_bits(solver: DenseSolver, geometry: DenseGeometry, rows: Tensor, delta: float) -> float:
    """Stored bits per weight, predicted from a sample of rows."""
    bits: float = 64.0 * math.prod(geometry.offsets_shape) / geometry.weights
    bits += 8.0 * sum(len(name) + _ENTRY for name in geometry.tensors) / geometry.weights
    for plane in solver.solve(rows.to(solver.weight.device), delta):
        header, blobs = trial_bits([plane])
        bits += blobs / plane.codes.numel()
        bits += header * len(geometry.bands) / geometry.weights
    return float(bits)


def _silent(module: nn.Module, width: int) -> Callable[..., Tensor]:
    """Stands for experts that answer zero: what they add is not seen by the block's Linears."""

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        call = route(module, *args, **kwargs)
        return call.hidden.new_zeros(*call.shape, width)

    return forward


class _Moments:
    """Sums of x x^T over the inputs of modules; modules that are called with one and the same
    tensor share a sum.
    """

    def __init__(
        self, walk: Walk, tokens: Sequence[Sequence[Tensor]], device: torch.device
    ) -> None:
        """Args:
        walk: says which batch is running.
        tokens: for each kind of token sequence (decoder, encoder), for every batch, which to
            learn from; the first whose number fits is taken.
        device: where sums are kept.
        """
        self._walk, self._tokens, self._device = walk, tokens, device
        self._leader: dict[nn.Module, nn.Module] = {}
        self._sums: dict[nn.Module, Tensor] = {}
        self._last: tuple[int, Tensor, nn.Module] | None = None

    def add(self, module: nn.Module, x: Tensor) -> None:
        """Takes in the input of one call."""
        batch = self._walk.batch
        if self._last is not None and self._last[0] == batch and self._last[1] is x:
            leader = self._last[2]
        else:
            leader = module
        if self._leader.setdefault(module, leader) is module:
            rows = x.detach().flatten(0, -2)
            part = second_moment(rows[self._keep(batch, len(rows))].to(self._device).float())
            if module in self._sums:
                self._sums[module] += part
            else:
                self._sums[module] = part
            leader = module
        self._last = (batch, x, leader)

    def _keep(self, batch: int, rows: int) -> Tensor:
        """Rows of a batch to learn from: all of them where they are no tokens in order."""
        for masks in self._tokens:
            if len(masks[batch]) == rows:
                return masks[batch]
        return torch.ones(rows, dtype=torch.bool)

    def of(self, module: nn.Module) -> Tensor:
        """The sum for a module; zeros if it was never called."""
        leader = self._leader.get(module)
        if leader is None:
            weight = module.get_parameter("weight")
            cols = weight.shape[1]
            return torch.zeros(cols, cols, dtype=torch.float64, device=self._device)
        return self._sums[leader]
