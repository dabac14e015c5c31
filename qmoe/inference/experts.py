"""The module that stands where a model's experts stood: encoded matrices, decoded where they are
used.

It keeps the original module (its *host*) for activation, gate function and limits, but not its
matrices. Biases and norms are taken over as parameters and children of their own names. Knows
nothing about calibration, solvers or files.

What runs on a device is a *backend* in `BACKENDS`, by device type. The CPU backend below serves
every device that has none of its own.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qmoe import codec
from qmoe.inference import operator
from qmoe.inference.cache import ByteCache
from qmoe.inference.on_cpu import run_on_cpu
from qmoe.models.families.find import KINDS
from qmoe.models.families.kind import Bias
from qmoe.store.stored_experts import StoredExperts
from qmoe.types import ExpertsLayout

# Bound of all parsed side data of one model: so much, and a share of the bytes of its streams. Side
# data takes about a tenth of them, so that all of it is kept.
PARSED_BYTES, PARSED_SHARE = 64 << 20, 0.25

# (module, hidden [n, cols], index [n, slots], weights [n, slots] or None) -> [n, width]
Backend = Callable[["EncodedExperts", Tensor, Tensor, Tensor | None], Tensor]
BACKENDS: dict[str, Backend] = {}


class Caches:
    """What the encoded modules of one model share: decoded matrices and parsed side data, both
    bounded in bytes."""

    def __init__(self, decoded_bytes: int = 0) -> None:
        """Args: decoded_bytes: bound of the decoded matrices; 0 decodes at every use."""
        self.decoded = ByteCache(decoded_bytes)
        self.parsed = ByteCache(PARSED_BYTES, evict=False)

    def expect(self, stream_bytes: int) -> None:
        """Makes room for the side data of a module with so many bytes of streams."""
        self.parsed.capacity += int(PARSED_SHARE * stream_bytes)


class EncodedExperts(nn.Module):
    """Experts whose matrices stay encoded.

    Parameters (not buffers, so that offloading moves them): ``stream`` uint8 [n] and ``offsets``
    int64 [E, projections, 4], see `StoredExperts`; besides them the host's biases and norms.
    """

    stream: nn.Parameter
    offsets: nn.Parameter

    def __init__(
        self,
        host: nn.Module,
        layout: ExpertsLayout,
        stream_bytes: int,
        caches: Caches,
        identity: Hashable = None,
    ) -> None:
        """Takes over from a dense module; parameters are created on the current default device,
        empty.

        Args:
            host: the model's experts module; loses its matrices.
            layout: its geometry.
            stream_bytes: length of the stream.
            caches: shared by the modules of a model; they may be shared by models.
            identity: names the bytes of the streams, such as their checksums: what was decoded from
                equal ones is the same. None: these bytes are like no others.
        """
        super().__init__()
        self.layout, self.caches = layout, caches
        self.identity = object() if identity is None else identity
        caches.expect(stream_bytes)
        self.kind = KINDS[layout.kind]
        self.num_experts = layout.experts
        self._projection = {p.name: i for i, p in enumerate(layout.projections)}
        self.encoded_names = encoded = self.kind.encoded(host)  # parameters that are no more
        for name in encoded:
            owner, _, leaf = name.rpartition(".")
            del host.get_submodule(owner)._parameters[leaf]
        self._take_over(host, self, {name.rpartition(".")[0] for name in encoded})
        # A plain attribute: the host is no child, its parameters and names are ours.
        object.__setattr__(self, "host", host)
        shape = (layout.experts, len(layout.projections), 4)
        empty = torch.empty(stream_bytes, dtype=torch.uint8), torch.empty(shape, dtype=torch.int64)
        self.stream, self.offsets = (nn.Parameter(t, requires_grad=False) for t in empty)
        self._checked: tuple[Any, Any, StoredExperts] | None = None
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]
        self._number = operator.register(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._number = operator.register(self)  # a copy is another module

    @staticmethod
    def _take_over(host: nn.Module, target: nn.Module, emptied: set[str]) -> None:
        for name, parameter in list(host._parameters.items()):
            if parameter is not None:
                target.register_parameter(name, parameter)
                del host._parameters[name]
        for name, child in host.named_children():
            inside = {p.partition(".")[2] for p in emptied if p.partition(".")[0] == name}
            if "" in inside:  # a Linear without its weight
                if child._parameters.get("bias") is not None:
                    target.add_module(name, Bias(child._parameters["bias"]))  # type: ignore[arg-type]
            elif inside:
                holder = nn.Module()
                EncodedExperts._take_over(child, holder, inside)
                target.add_module(name, holder)
            else:  # activations and norms: shared with the host, which calls them
                target.add_module(name, child)

    def encoded(self) -> StoredExperts:
        """The streams where they are now (offloading moves them), validated once per place.

        Raises:
            CorruptError: the offsets are not valid.
        """
        now = (self.stream, self.offsets)
        if self._checked is not None and all(
            a is b for a, b in zip(now, self._checked[:2], strict=True)
        ):
            return self._checked[2]
        found = StoredExperts(self.layout, self.stream.detach().cpu(), self.offsets.detach().cpu())
        if not self.offloaded:
            self._checked = (*now, found)
        return found

    @property
    def offloaded(self) -> bool:
        """Whether parameters only exist during a call; then nothing that refers to them may be
        kept."""
        return bool(getattr(getattr(self, "_hf_hook", None), "offload", False))

    def parsed(
        self, streams: StoredExperts, expert: int, projection: int
    ) -> tuple[codec.Tables, codec.ParsedMatrix]:
        """Tables and side data of one matrix, from the cache where that is allowed."""
        if self.offloaded:
            tables = streams.tables(expert, projection)
            return tables, streams.matrix(expert, projection, tables)

        def make() -> tuple[codec.Tables, codec.ParsedMatrix]:
            tables: codec.Tables = self.caches.parsed.get(
                (*self._key, "tables", streams.tables_at(expert, projection)),
                lambda: streams.tables(expert, projection),
                lambda t: t.bytes_held,
            )
            return tables, streams.matrix(expert, projection, tables)

        key = (*self._key, expert, projection)
        found: tuple[codec.Tables, codec.ParsedMatrix] = self.caches.parsed.get(
            key, make, lambda parsed: parsed[1].side_bytes
        )
        return found

    @property
    def _key(self) -> tuple[Hashable, str]:
        return self.identity, self.layout.path

    def linear(self, streams: StoredExperts, expert: int, name: str, x: Tensor) -> Tensor:
        """``x @ W.T`` for one encoded matrix.

        Args:
            streams: from `encoded`.
            expert: index.
            name: projection.
            x: [n, cols] on any device, float32, bfloat16 or float16.

        Returns:
            [n, rows], dtype and device of `x`.
        """
        projection = self._projection[name]
        if self.decodes_inside(x):
            return codec.linear(*self.parsed(streams, expert, projection), x)

        def decode() -> Tensor:
            exact = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
            tables, matrix = self.parsed(streams, expert, projection)
            weights = codec.decode_dense(tables, matrix, exact).contiguous()
            return weights.to(x.device, x.dtype)

        key = (*self._key, expert, projection, x.dtype, x.device)
        return F.linear(x, self.caches.decoded.get(key, decode, lambda w: w.nbytes))

    def linear_few(
        self, streams: StoredExperts, experts: list[int], counts: list[int], name: str, x: Tensor
    ) -> Tensor:
        """``x[i] @ W[e].T`` for every expert e and its rows i of x, which lie behind each other and
        are at most `codec.FEW`: [k, cols] -> [k, rows]; otherwise as `linear`."""
        if not self.decodes_inside(x):
            each = zip(experts, x.split(counts), strict=True)
            return torch.cat([self.linear(streams, e, name, rows) for e, rows in each])
        projection = self._projection[name]
        matrices = [self.parsed(streams, e, projection) for e in experts]
        y = codec.matmul_few(matrices, counts, x.detach().float().cpu())
        return y.to(x.device, x.dtype)

    def decodes_inside(self, x: Tensor) -> bool:
        """Whether a product with x may decode as it goes, or for itself alone. That has no
        gradient; a product with weights that are kept passes it on to x."""
        learns = x.requires_grad and torch.is_grad_enabled()
        return not (learns or self.caches.decoded.capacity)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Takes what the host's forward takes and returns what it returns."""
        routed = self.kind.route(self.host, *args, **kwargs)
        backend = BACKENDS.get(routed.hidden.device.type)
        inputs = (routed.hidden, routed.index, routed.weights)
        if backend is not None:
            out = backend(self, *inputs)
        elif torch.compiler.is_compiling():
            out = operator.apply(self._number, *inputs, [p for _, p in self.own_parameters()])
        else:
            out = run_on_cpu(self, *inputs)
        return out.reshape(*routed.shape, out.shape[-1])

    def run_plain(self, hidden: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
        """`run_on_cpu` of this module."""
        return run_on_cpu(self, hidden, index, weights)

    @property
    def width(self) -> int:
        """Columns of the experts' output."""
        projections = self.layout.projections
        return next((p.rows for p in projections if p.inner), projections[-1].rows)

    def own_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that are not streams: biases and norms, by name."""
        return [(n, p) for n, p in self.named_parameters() if n not in ("stream", "offsets")]

    def extra_repr(self) -> str:
        matrices = ", ".join(f"{p.name} {p.rows}x{p.cols}" for p in self.layout.projections)
        return f"experts={self.num_experts}, {matrices}, bytes={self.stream.numel()}"


def _forget(module: nn.Module, _: Any) -> None:
    """New weights were loaded into the module: what was decoded from the old ones is void."""
    if isinstance(module, EncodedExperts):
        module.__dict__.pop("_kernel_pack", None)
        module.identity = object()
        module.caches.decoded.clear()
        module.caches.parsed.clear()
