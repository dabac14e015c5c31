"""Which experts of a layer a rank keeps, and their encoded form with the tensors that stay.

Knows nothing about vLLM: a rank is two numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qmoe.inference.experts import Caches, EncodedExperts
from qmoe.store.reader import Container


def dealt(experts: int, rank: int, size: int) -> Tensor:
    """Whole experts in turn: expert e belongs to rank ``e % size``.

    A slice of every expert, as tensor parallelism cuts dense ones, would not do: a stream codes all
    columns of some rows, so every rank would decode the whole of "down".

    Returns:
        int64 [experts]: number of the expert on this rank, -1 for those of other ranks.
    """
    index = torch.full((experts,), -1, dtype=torch.int64)
    index[rank::size] = torch.arange(len(range(rank, experts, size)))
    return index


def owned(index: Tensor) -> list[int]:
    """The experts of a map as `dealt` makes it, in the order of their local numbers."""
    order = {int(local): expert for expert, local in enumerate(index) if local >= 0}
    return [order[i] for i in range(len(order))]


def build(
    container: Container,
    host: nn.Module,
    path: str,
    own: Sequence[int],
    caches: Caches,
    dtype: torch.dtype,
) -> EncodedExperts:
    """The encoded module of some of a layer's experts; nothing of the others is read.

    Args:
        container: the checkpoint.
        host: the family's experts module on the meta device; loses its parameters.
        path: of the module in the transformers model.
        own: at least one expert.
        caches: shared by the modules of a model.
        dtype: of biases and norms.

    Returns:
        A module on the CPU whose expert i is ``own[i]``. Biases, one row an expert, are cut
        likewise; what all experts share (a norm behind them) is whole.
    """
    streams = container.some_experts(path, own)
    module = EncodedExperts(host, streams.layout, streams.stream.numel(), caches)
    module.stream.data, module.offsets.data = streams.stream, streams.offsets
    whole = container.modules[path].experts
    for name in [n for n, _ in module.named_parameters()]:
        if name in ("stream", "offsets"):
            continue
        tensor = container.read(f"{path}.{name}")
        if "." not in name and tensor.shape[0] == whole:
            tensor = tensor[list(own)].clone()
        parent, _, leaf = name.rpartition(".")
        fresh = nn.Parameter(tensor.to(dtype), requires_grad=False)
        module.get_submodule(parent).register_parameter(leaf, fresh)
    return module


def bytes_of(module: EncodedExperts | None) -> int:
    """Bytes that a rank keeps of a layer's experts, wherever they are."""
    return 0 if module is None else sum(p.nbytes for p in module.parameters())


def expert_bytes(model: nn.Module) -> int:
    """Bytes that a rank keeps of all layers' experts: ``llm.apply_model(expert_bytes)`` asks every
    worker of vLLM."""
    return sum(bytes_of(m) for m in model.modules() if isinstance(m, EncodedExperts))
