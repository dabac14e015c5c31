"""The kernels as a backend of encoded experts: nothing is unpacked, routing stays on the device.

Registered for CUDA devices when a model is loaded. A layer's streams are laid out for the kernels
then; that is the only host work. The streams themselves leave the GPU: what is resident there is
one copy of the experts, and the CPU keeps the other, from which models are saved and moved.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qmoe.codec import ParsedMatrix, Tables
from qmoe.errors import QmoeError
from qmoe.inference.experts import BACKENDS, EncodedExperts
from qmoe.inference.on_cpu import run_on_cpu
from qmoe.kernels.launch import plan_of, segments
from qmoe.kernels.ops import ExpertsPack, experts_forward, project_pairs
from qmoe.kernels.pack import Map, PackedProjection, pack_projection
from qmoe.kernels.selfcheck import trusted
from qmoe.store.stored_experts import StoredExperts

PACK = "_kernel_pack"  # of a module's dict
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "num_selected_experts", "moe_topk",
          "moe_k", "top_k_experts", "top_k")  # fmt: skip


@dataclass(frozen=True)
class Pack:
    """A layer as the kernels want it.

    Attributes:
        key: the parameters it was made from; None for a module whose parameters exist during a call
            only, which are the same ones every time.
        projections: by name.
        biases: [E, rows] by projection name; empty for most families.
        fused: SwiGLU on concatenated gate and up without biases or norms, which has kernels of
            its own.
    """

    key: tuple[Tensor, Tensor] | None
    projections: dict[str, PackedProjection]
    biases: dict[str, Tensor]
    fused: ExpertsPack | None

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.projections.values())).words.device

    def to(self, device: torch.device) -> "Pack":
        """A copy on `device`."""
        projections = {n: p.to(device, non_blocking=True) for n, p in self.projections.items()}
        biases = {n: b.to(device) for n, b in self.biases.items()}
        fused = None
        if self.fused is not None:
            fused = ExpertsPack(projections["gate_up"], projections["down"])
        return Pack(self.key, projections, biases, fused)

    def nbytes(self) -> int:
        """Bytes of the projections."""
        return sum(p.nbytes() for p in self.projections.values())


def run_kernels(
    module: EncodedExperts, hidden: Tensor, index: Tensor, weights: Tensor | None
) -> Tensor:
    """The experts of a layer through `qmoe.kernels`; same contract as `experts.run_on_cpu`.

    Args:
        module: the encoded experts.
        hidden: [n, cols] bf16, fp16 or float32.
        index: int64 [n, slots]; values >= `num_experts` are skipped.
        weights: [n, slots] or None for 1.

    Returns:
        [n, width], dtype and device of `hidden`.
    """
    pack = _pack_of(module, hidden.device, index.shape[1])
    if pack is None:
        return run_on_cpu(module, hidden, index, weights)
    share = torch.ones_like(index, dtype=torch.float32) if weights is None else weights
    if pack.fused is not None:
        return experts_forward(pack.fused, hidden, index, share)
    flat = index.reshape(-1)
    used = (flat >= 0) & (flat < module.num_experts)
    safe = torch.where(used, flat, 0)
    x = hidden.repeat_interleave(index.shape[1], 0)
    y = module.kind.ffn(
        module.host,
        lambda name, h: project_pairs(pack.projections[name], h, flat),
        {name: bias[safe] for name, bias in pack.biases.items()},
        x,
        None,
    )
    y = y.float() * torch.where(used, share.reshape(-1).float(), 0.0)[:, None]
    return y.view(*index.shape, -1).sum(1).to(hidden.dtype)


def _pack_of(module: EncodedExperts, device: torch.device, top_k: int) -> Pack | None:
    """The pack of a module on a device, made if there is none yet; None if the kernels are not to
    be trusted there.
    """
    found: Pack | None = module.__dict__.get(PACK)
    now = (module.stream, module.offsets)
    if found is not None and (
        found.key is None or all(a is b for a, b in zip(found.key, now, strict=True))
    ):
        if found.device == device:
            return found
        if module.offloaded:  # the copy on the CPU stays
            return found.to(device)
        return _keep(module, found.to(device))
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise QmoeError(
            f"{module.layout.path} is packed for {device} at its first call, which cannot be "
            "captured in a CUDA graph; call the model once before"
        )
    with workers() as run:
        return _make(module, device, top_k, run)


def _make(module: EncodedExperts, device: torch.device, top_k: int, run: Map) -> Pack | None:
    projections = pack_streams(module.encoded(), device, top_k, run)
    if not all(trusted(p) for p in projections.values()):
        return None
    rows = [module.kind.biases(module.host, module, e) for e in range(module.num_experts)]
    biases = {name: torch.stack([r[name] for r in rows]).to(device) for name in rows[0]}
    fused = None
    if _plain_swiglu(module) and not biases:
        fused = ExpertsPack(projections["gate_up"], projections["down"])
    made = Pack((module.stream, module.offsets), projections, biases, fused)
    if module.offloaded:
        module.__dict__[PACK] = replace(made, key=None).to(torch.device("cpu"))
        return made
    return _keep(module, made)


def _keep(module: EncodedExperts, pack: Pack) -> Pack:
    """Notes a module's pack; its stream goes to the CPU."""
    module.__dict__[PACK] = pack
    if pack.device.type != "cpu":
        module.stream.data = module.stream.data.cpu()
    return pack


def pack_streams(
    streams: StoredExperts, device: torch.device, top_k: int, run: Map = map
) -> dict[str, PackedProjection]:
    """Kernel form of a layer on a device, cut as the device's plan says.

    Args:
        streams: the encoded experts.
        device: where to.
        top_k: experts of a token.
        run: applies a function to every expert, see `pack_projection`.

    Returns:
        The projections by name.
    """
    plan, experts = plan_of(device), range(streams.layout.experts)
    made = {}
    for j, p in enumerate(streams.layout.projections):
        tables: dict[tuple[int, int], Tables] = {}  # matrices of a group share the object
        for e in experts:
            if (at := streams.tables_at(e, j)) not in tables:
                tables[at] = streams.tables(e, j)

        mine = [tables[streams.tables_at(e, j)] for e in experts]
        parsed = run(partial(_parsed, streams, j), experts, mine)
        cut = segments(plan, p.rows, p.cols, top_k)
        made[p.name] = pack_projection(list(parsed), cut, run).to(device)
    return made


def _parsed(
    streams: StoredExperts, projection: int, expert: int, tables: Tables
) -> tuple[Tables, ParsedMatrix]:
    return tables, streams.matrix(expert, projection, tables)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def workers() -> Iterator[Map]:
    """A `map` on all cores this process may use; the loops it is for release the interpreter."""
    with ThreadPoolExecutor(cores()) as pool:
        yield pool.map


def prepare(model: Any, devices: Iterable[str] = ("cuda",)) -> int:
    """Packs all encoded experts of a model that are on a device of the kernels, with a progress
    bar; what is offloaded is packed at its first call, and kept on the CPU.

    Args:
        model: loaded.
        devices: types of devices.

    Returns:
        Bytes of all packs.
    """
    modules = [m for m in model.modules() if isinstance(m, EncodedExperts)]
    modules = [m for m in modules if m.stream.device.type in devices and not m.offloaded]
    top_k, total = experts_per_token(model.config), 0
    with workers() as run:
        for module in tqdm(modules, "Packing experts for the GPU", unit="layer", delay=2):
            pack = _make(module, module.stream.device, top_k, run)
            if pack is None:  # said so in a warning
                return 0
            total += pack.nbytes()
    return total


def experts_per_token(config: Any) -> int:
    """Experts that a token uses, by the usual names of the setting; 1 where there is none, as in
    switch. Streams are cut by it, results do not depend on it.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = (getattr(text, name, None) for name in _TOP_K)
    return next((k for k in found if isinstance(k, int) and k > 0), 1)


def settle(module: EncodedExperts, device: torch.device, top_k: int) -> None:
    """Lays a layer out for the kernels now and for good: its streams, on the CPU too, are dropped.
    For engines that load once and capture graphs.

    Args:
        module: with its streams; afterwards only `run_kernels` can run it.
        device: where it will run.
        top_k: experts of a token.

    Raises:
        QmoeError: the kernels do not give right results there.
    """
    with workers() as run:
        pack = _make(module, device, top_k, run)
    if pack is None:
        raise QmoeError(f"the kernels do not give right results on {device}; run it on a CPU")
    for parameter in (module.stream, module.offsets):
        parameter.data = parameter.data.new_empty(0)
    module._checked = None


def _plain_swiglu(module: EncodedExperts) -> bool:
    """Whether the experts are ``down(silu(gate) * up)`` with gate rows first and nothing else."""
    host: Any = module.host
    names = [p.name for p in module.layout.projections]
    if module.kind.name != "fused" or names != ["gate_up", "down"]:
        return False
    default = "_default_apply_gate"
    return (
        getattr(type(host)._apply_gate, "__name__", "") == default
        and type(getattr(host, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
        and getattr(host, "is_concatenated", True)
        and not getattr(host, "has_post_expert_norm", False)
    )


def register() -> None:
    """Lets CUDA tensors take the kernels."""
    BACKENDS["cuda"] = run_kernels
