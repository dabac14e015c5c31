"""The backend that needs nothing: encoded experts decoded on the CPU. Knows no device and no files.

Experts that have few tokens go through one compiled call together, the others through one of their
own each. A token's result does not depend on the tokens beside it as long as its experts' products
are those of `codec.matvec`.
"""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qmoe import codec
from qmoe.inference.combine import add_rows
from qmoe.models.families.kind import Routed

# Weights that are decoded once more rather than multiplied in calls of their own, which take a
# tenth of a millisecond for an expert
AGAIN = 3 << 18


def run_on_cpu(module: Any, hidden: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
    """Matrices are decoded on the CPU, dense products run where `hidden` is.

    Replaces ``for e in experts: y[rows(e)] += weight[e] * ffn(hidden[rows(e)], decode(e))``.

    Args:
        module: the `EncodedExperts`: supplies streams, gate function and biases.
        hidden: [n, cols].
        index: int64 [n, slots], experts; values >= `num_experts` are skipped.
        weights: [n, slots], or None for 1.

    Returns:
        [n, width], dtype and device of `hidden`.
    """
    streams = module.encoded()
    experts: list[int] = index[0].tolist() if len(hidden) == 1 else []
    if _distinct(experts, module.num_experts):
        return _one_token(module, streams, hidden, experts, weights)
    if module.decodes_inside(hidden) and index.numel():
        return _sorted(module, streams, hidden, index, weights)

    def one(expert: int, x: Tensor) -> Tensor:
        return _ffn(module, streams, expert, x)

    return Routed(hidden, index, weights, (len(hidden),)).run(module.num_experts, one)


def _ffn(module: Any, streams: Any, expert: int, x: Tensor) -> Tensor:
    """One expert: [m, cols] -> [m, width]."""
    kind, host = module.kind, module.host
    biases = kind.biases(host, module, expert)
    y: Tensor = kind.ffn(host, partial(module.linear, streams, expert), biases, x, None)
    return y


def _few(module: Any, streams: Any, experts: list[int], counts: list[int], x: Tensor) -> Tensor:
    """Several experts, each with its next few rows of x."""
    kind, host = module.kind, module.host
    own = [kind.biases(host, module, e) for e in experts]
    each = [b for b, n in zip(own, counts, strict=True) for _ in range(n)]
    biases = {name: torch.stack([b[name] for b in each]) for name in own[0]}
    y: Tensor = kind.ffn(
        host, partial(module.linear_few, streams, experts, counts), biases, x, None
    )
    return y


def _one_token(
    module: Any, streams: Any, hidden: Tensor, experts: list[int], weights: Tensor | None
) -> Tensor:
    y = _few(module, streams, experts, [1] * len(experts), hidden.expand(len(experts), -1))
    rows = (y if weights is None else y * weights.reshape(-1, 1)).float().unbind()
    total, *others = [rows[i] for i in sorted(range(len(experts)), key=experts.__getitem__)]
    for row in others:  # in the order of `Routed.run`
        total = total + row
    return total.to(hidden.dtype)[None]


def _sorted(
    module: Any, streams: Any, hidden: Tensor, index: Tensor, weights: Tensor | None
) -> Tensor:
    """Expert by expert, as `Routed.run` adds up, but those with few tokens computed together."""
    found = torch.sort(index.reshape(-1), stable=True)
    numbers = torch.arange(module.num_experts + 1, device=index.device)
    first = torch.searchsorted(found.values, numbers).tolist()
    rows = found.indices // index.shape[1]
    shares = None if weights is None else weights.reshape(-1)[found.indices]
    ranges = {e: (a, b) for e, (a, b) in enumerate(pairwise(first)) if a < b}
    size = sum(p.rows * p.cols for p in module.layout.projections)
    few = {e: r for e, r in ranges.items() if (r[1] - r[0] - 1) // codec.FEW * size <= AGAIN}
    together: Iterator[Tensor] = iter(())
    if few:
        parts = [
            (e, min(codec.FEW, b - k)) for e, (a, b) in few.items() for k in range(a, b, codec.FEW)
        ]
        at = torch.cat([rows[a:b] for a, b in few.values()])
        y = _few(module, streams, [e for e, _ in parts], [n for _, n in parts], hidden[at])
        together = iter(y.split([b - a for a, b in few.values()]))
    out = torch.zeros(len(hidden), module.width, device=hidden.device)
    for e, (a, b) in ranges.items():
        y = next(together) if e in few else _ffn(module, streams, e, hidden[rows[a:b]])
        add_rows(out, rows[a:b], y, None if shares is None else shares[a:b])
    return out.to(hidden.dtype)


def _distinct(experts: list[int], count: int) -> bool:
    """Whether these are experts of 0..count - 1, at least one, and none twice."""
    return (
        bool(experts)
        and min(experts) >= 0
        and max(experts) < count
        and len({*experts}) == len(experts)
    )
