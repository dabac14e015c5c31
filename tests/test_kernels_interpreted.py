"""The Triton kernels themselves, run by Triton's interpreter on the CPU against their twins.

The interpreter is chosen when a kernel is defined, so these tests need a process of their own:
without TRITON_INTERPRET=1 this file has one test, which starts that process.
"""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from qmoe.kernels import launch, ops, pair_groups, project, twins
from qmoe.measure.kernels import gpu as bench
from qmoe.measure.kernels.sample import packed
from qmoe.measure.kernels.sample import rough_matrix as matrix

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="runs in the process that test_in_the_interpreter starts"
)


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, cwd=os.getcwd(),
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh memory holds NaN or a large integer."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(t):
        return t.fill_(
            float("nan") if t.is_floating_point() else 0x3FFFFFFF if t.dtype.itemsize > 1 else 1
        )

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))


CASES = {
    "one weight": ([matrix(1, 1, 3.0)], 1, None),
    "ragged": ([matrix(33, 17), matrix(33, 17, seed=1)], 1, None),
    "zeros": ([matrix(5, 40, 0.0)], 1, None),
    "dense": ([matrix(3, 50, 3.0)], 2, None),
    "wide": ([matrix(4, 40, 60.0)], 1, None),
    "10 bits": ([matrix(6, 40)], 2, 10),
    "12 bits": ([matrix(6, 40, 8.0)], 1, 12),
    "4097 rows": ([matrix(4097, 1)], 1, None),
    "4097 columns": ([matrix(1, 4097, 0.05)], 1, None),
    "two pieces": ([matrix(2, 1030, 0.1)], 3, None),
    "two row scales": ([matrix(4, 60, negative=True)], 1, None),
}


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_decoded_integers_are_equal(name):
    matrices, segments, limit = CASES[name]
    p = packed(matrices, segments, limit)
    for e, m in enumerate(matrices):
        assert torch.equal(project.weights(p, e), m.dequantize())
        assert torch.equal(twins.weights_torch(p, e), m.dequantize())


@interpreted
@pytest.mark.parametrize("name", [n for n in CASES if "4097" not in n])
def test_product_of_every_kind(name):
    matrices, segments, limit = CASES[name]
    p = packed(matrices, segments, limit)
    x = torch.randn(2, p.cols)
    index = torch.tensor([p.experts - 1, 0])
    y = project.project(p, x, index, 1, batch=2)
    assert torch.allclose(y, twins.project_torch(p, x, index, 1), rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_batch_gives_the_same_bits(dtype):
    p = packed([matrix(10, 30, seed=s) for s in range(3)])
    index = torch.tensor(
        [0, 0, 0, 2, 3, -1, 0, 0, 0, 0, 0, 0]
    )  # 1 is empty, 2 starved, 0 hot; two pairs of no expert
    x = torch.randn(6, 30).to(dtype)
    twin = twins.project_torch(p, x, index, 2)
    first = project.project(p, x, index, 2, batch=1)
    assert bench.relative_rms(first, twin) < bench.TOLERANCE[dtype]
    assert not first[4:6].any()
    for batch in (2, 8) if dtype == torch.bfloat16 else (4,):
        assert torch.equal(project.project(p, x, index, 2, batch=batch), first)
    assert (
        bench.relative_rms(project.project(p, x, index, 2, batch=0), twin) < bench.TOLERANCE[dtype]
    )


@interpreted
@pytest.mark.parametrize("segments", [1, 2])
def test_warps_of_a_program_give_the_same_bits(segments):
    p = packed([matrix(200, 70, seed=s) for s in range(2)], segments)  # 7 tiles: one warp repeats
    x, index = torch.randn(2, 70).bfloat16(), torch.tensor([1, 0])
    one = project.project(p, x, index, 1, launch.PORTABLE, batch=1)
    for warps in (2, 4):
        wide = dataclasses.replace(launch.PORTABLE, warps=warps)
        assert torch.equal(project.project(p, x, index, 1, wide, batch=1), one)
    assert bench.relative_rms(one, twins.project_torch(p, x, index, 1)) < 2e-2


@interpreted
def test_result_of_a_pair_does_not_depend_on_the_others():
    p = packed([matrix(10, 40, seed=s) for s in range(2)])
    x = torch.randn(6, 40)
    index = torch.tensor([0, 1, 0, 0, 1, 0])
    for batch in (4, 0):
        y = project.project(p, x, index, 1, batch=batch)
        other = project.project(
            p,
            torch.cat([x[:1], torch.randn(5, 40)]),
            torch.tensor([0, 0, 1, 1, 1, 1]),
            1,
            batch=batch,
        )
        assert torch.equal(y[0], other[0])


@interpreted
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer(tokens, dtype):
    up = packed([matrix(24, 20, seed=s) for s in range(3)])
    down = packed([matrix(20, 12, seed=5 + s) for s in range(3)])
    pack = ops.ExpertsPack(up, down)
    hidden, index = (
        torch.randn(tokens, 20).to(dtype),
        torch.tensor([[1, 0], [1, 3], [1, 2]])[:tokens],
    )
    weight = torch.rand(tokens, 2)
    expected = bench.dense_layer(pack, hidden.float(), index, weight)
    for gate in ("silu", ops.silu_gate):
        y = ops.experts_forward(pack, hidden, index, weight, gate)
        assert y.dtype == dtype
        assert bench.relative_rms(y, expected) < bench.TOLERANCE[dtype]


@interpreted
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_groups(batch):
    index = torch.randint(-1, 6, (40,), generator=torch.Generator().manual_seed(batch))
    kernel = project.make_groups(index, 5, batch)
    twin = pair_groups.group_pairs_torch(index, 5, batch)
    for a, b in zip(kernel, twin, strict=True):
        assert torch.equal(a, b)
    expert, members, slots = kernel
    for pair, e in enumerate(index.tolist()):
        slot = int(slots[pair])
        assert (slot < 0) == (not 0 <= e < 5)
        if slot >= 0:
            assert expert[slot // batch] == e
            assert members.flatten()[slot] == pair


def guarded(t, value):
    """A copy of t inside a larger allocation filled with `value`."""
    whole = torch.full((t.numel() + 512,), value, dtype=t.dtype)
    whole[256:-256] = t.flatten()
    return whole, whole[256:-256].view(t.shape)


@interpreted
@pytest.mark.parametrize("seed", range(4))
def test_garbage_in_the_stream_stays_inside_the_buffers(seed):
    g = torch.Generator().manual_seed(seed)
    p = packed([matrix([20, 20, 20, 6][seed], 50, [0.05, 0.4, 3.0, 60.0][seed])], 1 + seed % 2)
    words = torch.randint(-(2**31), 2**31, p.words.shape, generator=g).int()
    if seed == 1:
        words.fill_(-1)
    x = torch.randn(1, 50, generator=g)
    expert, members, _ = project.make_groups(torch.zeros(1, dtype=torch.long), 1, 1)
    results = []
    for value in (0x11, 0x6E):  # what lies behind the buffers must not matter
        names = [
            f.name for f in dataclasses.fields(p) if isinstance(getattr(p, f.name), torch.Tensor)
        ]
        kept = {n: guarded(words if n == "words" else getattr(p, n), value) for n in names}
        q = dataclasses.replace(p, **{n: view for n, (_, view) in kept.items()})
        xs = guarded(project.gathered(q, x, expert, members, 1), float("nan"))
        warps = dataclasses.replace(launch.PORTABLE, warps=1 << seed % 3)
        sums = project.partial_sums(q, xs[1], expert, warps)
        codes = guarded(torch.zeros(1, p.rows, p.pieces, p.columns.shape[2] - 1), 7.0)
        project.decode_experts(
            q, codes[1], torch.ones(1, dtype=torch.int32), 0, launch.PORTABLE, ratio=False
        )
        assert (codes[0][:256] == 7).all()
        assert (codes[0][-256:] == 7).all()
        assert not sums.isnan().any()
        results.append((sums, codes[1].clone()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
