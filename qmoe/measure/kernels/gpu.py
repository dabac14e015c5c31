"""Timing of the kernels on a GPU against bf16: layers of random experts, correctness first, CUDA
graphs around everything.

`scripts/bench_gpu` and `scripts/tune` are its two users.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qmoe.inference.cuda import pack_streams, workers
from qmoe.kernels.launch import BATCHES, plan_of
from qmoe.kernels.ops import ExpertsPack, experts_forward, silu_gate
from qmoe.kernels.pack import PackedProjection
from qmoe.kernels.project import project, weights
from qmoe.kernels.selfcheck import plain
from qmoe.kernels.twins import project_torch, weights_torch
from qmoe.measure.kernels.sample import packed, rough_matrix, sample_matrix, stored_layer

DEVICE = "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # relative rms


@dataclass(frozen=True)
class Shape:
    """A model's expert layer: E experts of which k serve a token; gated experts have twice the rows
    in their first projection.
    """

    name: str
    hidden: int
    inner: int
    experts: int
    top_k: int
    gated: bool = True

    @property
    def up_rows(self) -> int:
        """Rows of the first projection."""
        return self.inner * (2 if self.gated else 1)

    @property
    def expert_weights(self) -> int:
        """Weights of one expert."""
        return self.hidden * (self.up_rows + self.inner)


SHAPES = (
    Shape("Switch-base", 768, 3072, 128, 1, gated=False),
    Shape("Mixtral", 4096, 14336, 8, 2),
    Shape("Qwen3-30B-A3B", 2048, 768, 128, 8),
    Shape("DeepSeek-V3", 7168, 2048, 64, 8),  # of 256: enough to leave the L2 cache
    Shape("switch-c-2048", 2080, 6144, 64, 1, gated=False),  # of 2048
)


def random_layer(shape: Shape, device: torch.device | str, bits: float = 0.8) -> ExpertsPack:
    """A layer of a shape on a device, packed as a loaded model's is."""
    shapes = ((shape.up_rows, shape.hidden), (shape.hidden, shape.inner))
    with workers() as run:
        made = pack_streams(
            stored_layer(shapes, shape.experts, bits), torch.device(device), shape.top_k, run
        )
    return ExpertsPack(made["gate_up"], made["down"])


def routing(
    tokens: int, experts: int, top_k: int, seed: int, device: str = DEVICE
) -> tuple[Tensor, Tensor]:
    """Random routing: index int64 and weights float32 [tokens, k], distinct experts per token."""
    g = torch.Generator().manual_seed(seed)
    score, index = torch.rand(tokens, experts, generator=g).topk(top_k)
    return index.to(device), (score / score.sum(1, keepdim=True)).to(device)


def relative_rms(y: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference over that of the reference."""
    return float((y.float() - reference.float()).norm() / reference.float().norm().clamp_min(1e-30))


def _samples() -> Iterator[tuple[str, PackedProjection]]:
    """Small ragged projections of every kind that real checkpoints hold, and what they are."""
    for bits, rows, cols, cut in ((0.8, 140, 200, 1), (0.8, 40, 1040, 3), (2.0, 33, 170, 2)):
        matrices = [sample_matrix(rows, cols, bits, seed) for seed in range(5)]
        yield f"{rows} x {cols} at {bits} bits, {cut} segments", packed(matrices, cut)
    for name, size, negative, cut, limit in (
        ("wide codes of 10 bits", 20.0, False, 2, 10),
        ("wide codes of 12 bits", 20.0, False, 1, 12),
        ("two row scales", 0.4, True, 4, None),
    ):
        matrices = [rough_matrix(40, 90, size, negative, seed) for seed in range(5)]
        yield name, packed(matrices, cut, limit)


def check(device: str = DEVICE) -> list[str]:
    """Compares every kernel with its twin on small ragged layers. Returns failures, one sentence
    each; empty = sound.
    """
    bad = []
    for where, made in _samples():
        p, cols = made.to(device), made.cols
        bad += [
            f"decoded expert {e} of {where} differs from the twin"
            for e in range(p.experts)
            if not torch.equal(weights(p, e), weights_torch(p, e))
        ]
        index = torch.tensor(
            [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3, 3, 0, 7, -1, 0], device=device
        )  # 2, 4 empty, 1 hot, two invalid
        for dtype, tolerance in TOLERANCE.items():
            x = torch.randn(8, cols, device=device).to(dtype)
            expected = project_torch(p, x, index, 2)
            plan = plan_of(x.device)
            for batch in (*BATCHES, 0):
                y = project(p, x, index, 2, plan, batch)
                what = f"product with {where}, {dtype}, {batch or 'grouped'}"
                error = relative_rms(y, expected)
                if not error <= tolerance:
                    bad.append(f"{what}: relative error {error:.2e}, at most {tolerance}")
                if not torch.equal(y, project(p, x, index, 2, plain(plan), batch)):
                    bad.append(f"{what}: not the bits of the plain loop")
    bad += _check_layer(device)
    return bad


def _check_layer(device: str) -> list[str]:
    bad = []
    shape = Shape("small", 96, 64, 6, 2)
    pack = random_layer(shape, device)
    for tokens in (1, 3, 40):
        hidden = torch.randn(tokens, shape.hidden, device=device, dtype=torch.bfloat16)
        index, weight = routing(tokens, shape.experts, shape.top_k, tokens, device)
        expected = dense_layer(pack, hidden.float(), index, weight)
        fused = experts_forward(pack, hidden, index, weight, "silu")
        composed = experts_forward(pack, hidden, index, weight, silu_gate)
        again = experts_forward(pack, hidden, index, weight, "silu")
        backend = "aot_eager" if device == "cpu" else "inductor"  # no C++ compiler is asked for
        graph = torch.compile(partial(experts_forward, pack), fullgraph=True, backend=backend)
        compiled = graph(hidden, index, weight)
        for name, y in (("fused", fused), ("composed", composed), ("compiled", compiled)):
            error = relative_rms(y, expected)
            if not error <= TOLERANCE[torch.bfloat16]:
                bad.append(f"layer, {name}, {tokens} tokens: relative error {error:.2e}")
        if not torch.equal(fused, again):
            bad.append(f"layer of {tokens} tokens differs from run to run")
    return bad


def dense_layer(pack: ExpertsPack, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The layer from decoded weights in float32."""
    out = torch.zeros_like(hidden)
    for e in range(pack.up.experts):
        token, slot = torch.where(index == e)
        h = silu_gate(hidden[token] @ weights_torch(pack.up, e).T)
        out.index_add_(0, token, h @ weights_torch(pack.down, e).T * weight[token, slot, None])
    return out


def graph_seconds(calls: Sequence[Callable[[], object]], replays: int = 20) -> float:
    """Median seconds per call of functions captured one after another in one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    for _ in range(replays + 3):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return sorted(times[3:])[replays // 2]


def bf16_calls(shape: Shape, tokens: int, rounds: int) -> list[Callable[[], object]]:
    """bf16 experts with the routing known beforehand: one matrix product per active expert and
    projection (what cuBLAS does best).
    """
    size = (shape.experts, shape.up_rows, shape.hidden), (shape.experts, shape.hidden, shape.inner)
    up, down = (torch.empty(s, dtype=torch.bfloat16, device=DEVICE).normal_(0, 0.02) for s in size)
    x = torch.randn(tokens, shape.hidden, device=DEVICE, dtype=torch.bfloat16)

    def layer(groups: list[tuple[int, Tensor]]) -> None:
        for e, token in groups:
            h = x[token] @ up[e].T
            _ = (silu_gate(h) if shape.gated else h) @ down[e].T

    out: list[Callable[[], object]] = []
    for r in range(rounds):
        index, _ = routing(tokens, shape.experts, shape.top_k, r, "cpu")
        groups = [
            (e, torch.where(index == e)[0].to(DEVICE))
            for e in sorted(set(index.flatten().tolist()))
        ]
        out.append(partial(layer, groups))
    return out


def grouped_calls(shape: Shape, tokens: int, rounds: int) -> list[Callable[[], object]]:
    """bf16 experts by torch's grouped product, tokens already sorted by expert; empty where this
    torch has none.
    """
    product = getattr(torch.nn.functional, "grouped_mm", None) or getattr(
        torch, "_grouped_mm", None
    )
    if product is None or shape.hidden % 8 or shape.inner % 8:
        return []
    up = torch.empty(
        shape.experts, shape.up_rows, shape.hidden, dtype=torch.bfloat16, device=DEVICE
    ).normal_(0, 0.02)
    down = torch.empty(
        shape.experts, shape.hidden, shape.inner, dtype=torch.bfloat16, device=DEVICE
    ).normal_(0, 0.02)
    x = torch.randn(tokens * shape.top_k, shape.hidden, device=DEVICE, dtype=torch.bfloat16)

    def layer(ends: Tensor) -> None:
        h = product(x, up.transpose(1, 2), offs=ends)
        product((silu_gate(h) if shape.gated else h).contiguous(), down.transpose(1, 2), offs=ends)

    out: list[Callable[[], object]] = []
    for r in range(rounds):
        index, _ = routing(tokens, shape.experts, shape.top_k, r, "cpu")
        ends = torch.bincount(index.flatten(), minlength=shape.experts).cumsum(0).int().to(DEVICE)
        out.append(partial(layer, ends))
    return out


def encoded_calls(
    pack: ExpertsPack, shape: Shape, tokens: int, rounds: int
) -> list[Callable[[], object]]:
    """The encoded layer on the same routings."""
    x = torch.randn(tokens, shape.hidden, device=DEVICE, dtype=torch.bfloat16)
    gate = "silu" if shape.gated else torch.relu
    routes = [routing(tokens, shape.experts, shape.top_k, r) for r in range(rounds)]
    return [partial(experts_forward, pack, x, i, w, gate) for i, w in routes]


def active_weights(shape: Shape, tokens: int, rounds: int) -> float:
    """Mean number of weights of the experts that a call touches."""
    active = [
        len(set(routing(tokens, shape.experts, shape.top_k, r, "cpu")[0].flatten().tolist()))
        for r in range(rounds)
    ]
    return shape.expert_weights * sum(active) / rounds
