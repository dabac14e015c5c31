"""Kernel form of experts, torch twins, operators on the CPU, launch plans, and compilation without
a GPU.
"""

import dataclasses
import json
import os

import pytest
import torch

from qmoe.codec import decode_codes, encode_group
from qmoe.errors import CorruptError
from qmoe.kernels import launch, ops, shared, twins
from qmoe.kernels.interleave import BLOCK_TILES, LANES
from qmoe.kernels.pack import GROUP_BITS, PackedProjection, pack_projection
from qmoe.measure.kernels import gpu as bench
from qmoe.measure.kernels import sass, static
from qmoe.measure.kernels.sample import packed, parsed, sample_matrix
from qmoe.measure.kernels.sample import rough_matrix as matrix
from qmoe.measure.kernels.trace import trace

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize(
    ("rows", "cols"),
    [
        (1, 1),
        (2, 2),
        (1, 4097),
        (4097, 1),
        (31, 15),
        (32, 16),
        (33, 17),
        (64, 767),
        (20, 1024),
        (40, 1025),
        (9, 3000),
    ],
)
def test_twin_decodes_every_shape(rows, cols, segments):
    matrices = [matrix(rows, cols, seed=s) for s in range(2)]
    p = pack_projection(parsed(matrices), segments)
    for e, m in enumerate(matrices):
        assert torch.equal(twins.weights_torch(p, e), m.dequantize())


@pytest.mark.parametrize("size", [0.0, 0.02, 3.0, 60.0])
@pytest.mark.parametrize("limit", [8, 10, 12])
def test_twin_decodes_every_alphabet(size, limit):
    m = matrix(50, 200, size)
    p = pack_projection(parsed([m], limit))
    assert p.limits == (limit,) or (p.limits == (7,) and limit == 8)
    assert torch.equal(twins.weights_torch(p, 0), m.dequantize())


def test_starts_near_and_far_and_weights_that_a_cut_goes_through():
    m = matrix(40, 600, 60.0)  # weights of several symbols
    p = pack_projection(parsed([m], 8), 4)
    assert {bool(c) for c in (p.cuts < 0).flatten().tolist()} == {False, True}
    assert p.starts.shape[0] == p.cuts.numel() + int((p.cuts < 0).sum())
    assert p.over > 1
    assert torch.equal(twins.weights_torch(p, 0), m.dequantize())


@pytest.mark.parametrize("segments", [2, 5, 8])
def test_lanes_of_an_inner_segment_are_in_step(segments):
    m = sample_matrix(700, 1100)
    (entry,) = parsed([m])
    whole, p = pack_projection([entry]), pack_projection([entry], segments)
    assert torch.equal(p.words, whole.words)  # a cut moves nothing
    steps = twins.lanes_of(p, 0).steps.view(p.pieces, segments, p.tiles, LANES)[..., 0]
    most = (p.records[0, :, 1] & ((1 << GROUP_BITS) - 1)).view(p.pieces, p.tiles)
    assert torch.equal(steps.sum(1), most.long())  # no turn is added
    tile = torch.arange(p.tiles)
    block = steps[:, :, tile // BLOCK_TILES * BLOCK_TILES]
    ended = steps.cumsum(1) == most[:, None]
    assert ((steps == block) | ended)[:, :-1].all()
    assert not ended[:, 0].any()


def test_twin_decodes_two_row_scales():
    m = matrix(40, 300, negative=True)
    assert torch.equal(twins.weights_torch(pack_projection(parsed([m])), 0), m.dequantize())


def test_groups_with_different_code_limits():
    matrices = [matrix(40, 90, seed=s) for s in range(3)]
    p = pack_projection(parsed(matrices[:1], 8) + parsed(matrices[1:], 10), 2)
    assert p.limits == (7, 10)
    for e, m in enumerate(matrices):
        assert torch.equal(twins.weights_torch(p, e), m.dequantize())


def test_agrees_with_the_codec():
    (entry,) = parsed([sample_matrix(96, 1500)])
    assert torch.equal(
        twins.weights_torch(pack_projection([entry]), 0), decode_codes(*entry).dequantize()
    )


def test_lanes_hold_every_row_once_and_are_in_step():
    p = pack_projection(parsed([sample_matrix(300, 600)]))
    rows = p.lanes[0]
    assert sorted(rows[rows < 300].tolist()) == list(range(300))
    t = trace(p, 0, programs=p.programs)
    assert t.symbols_per_weight <= t.steps_per_weight < 1.15 * t.symbols_per_weight


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="at least one matrix"):
        pack_projection([])
    with pytest.raises(ValueError, match="1 to 8 segments, got 1 and 9"):
        pack_projection(parsed([matrix(4, 4)]), 9)
    with pytest.raises(ValueError, match="one shape"):
        pack_projection(parsed([matrix(4, 4)]) + parsed([matrix(4, 5)]))
    tables, layout = parsed([matrix(8, 40)])[0]
    start = layout.stream_start.clone()
    start[1] += 1
    with pytest.raises(CorruptError, match="does not end"):
        pack_projection([(tables, dataclasses.replace(layout, stream_start=start))])


def test_projection_survives_its_flat_form():
    for negative in (False, True):
        p = pack_projection(parsed([matrix(20, 30, negative=negative)]))
        q = PackedProjection.from_parts(p.tensors(), p.numbers())
        for f in dataclasses.fields(p):
            a, b = getattr(p, f.name), getattr(q, f.name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        assert p.nbytes() == sum(t.nbytes for t in p.tensors())


def test_memory_form_is_little_larger_than_the_file():
    m = sample_matrix(1536, 2048)
    group = encode_group([m])
    stored = group.tables.numel() + group.matrices[0].numel()
    assert pack_projection(parsed([m])).nbytes() < 1.25 * stored


def layer(experts=4, hidden=48, inner=40):
    up = pack_projection(parsed([matrix(2 * inner, hidden, seed=s) for s in range(experts)]))
    down = pack_projection(parsed([matrix(hidden, inner, seed=9 + s) for s in range(experts)]), 2)
    return ops.ExpertsPack(up, down)


@pytest.mark.skipif(INTERPRETED, reason="CPU path; test_kernels_interpreted.py runs kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_equals_the_loop_over_experts(dtype):
    pack = layer()
    hidden = torch.randn(6, 48, dtype=dtype)
    index = torch.tensor([[0, 1], [1, 0], [1, 3], [1, 0], [0, 1], [1, 3]])  # 2 is empty, 1 is hot
    weight = torch.rand(6, 2)
    expected = bench.dense_layer(pack, hidden.float(), index, weight)
    for gate in ("silu", ops.silu_gate):
        y = ops.experts_forward(pack, hidden, index, weight, gate)
        assert y.dtype == dtype
        assert bench.relative_rms(y, expected) < bench.TOLERANCE[dtype]


@pytest.mark.skipif(INTERPRETED, reason="CPU path; test_kernels_interpreted.py runs kernels")
def test_biases_and_foreign_experts():
    pack = layer()
    hidden, index, weight = torch.randn(2, 48), torch.tensor([[0, 3], [4, -1]]), torch.rand(2, 2)
    up, down = torch.randn(4, 80), torch.randn(4, 48)
    y = ops.experts_forward(pack, hidden, index, weight, ops.silu_gate, up, down)
    expected = torch.zeros(48)
    for k, e in enumerate((0, 3)):
        h = ops.silu_gate(hidden[:1] @ twins.weights_torch(pack.up, e).T + up[e])
        expected += weight[0, k] * (h @ twins.weights_torch(pack.down, e).T + down[e])[0]
    assert torch.allclose(y[0], expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    assert not y[1].any()


@pytest.mark.skipif(INTERPRETED, reason="CPU path; test_kernels_interpreted.py runs kernels")
def test_compiles_to_one_graph_and_passes_opcheck():
    pack = layer()
    hidden, index, weight = (
        torch.randn(3, 48),
        torch.tensor([[0, 1], [1, 0], [1, 3]]),
        torch.rand(3, 2),
    )

    def run(*args):
        return ops.experts_forward(pack, *args, "silu") + ops.experts_forward(
            pack, *args, ops.silu_gate
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(hidden, index, weight), run(hidden, index, weight))
    up, down = pack.up, pack.down
    args = (hidden, index, weight, up.tensors(), up.numbers(), down.tensors(), down.numbers())
    torch.library.opcheck(torch.ops.qmoe.experts_silu.default, args)
    torch.library.opcheck(
        torch.ops.qmoe.project.default, (hidden, index.flatten(), 2, up.tensors(), up.numbers())
    )


def test_layer_refuses_what_does_not_fit():
    pack = layer()
    hidden, index, weight = (
        torch.randn(3, 48),
        torch.zeros(3, 2, dtype=torch.long),
        torch.rand(3, 2),
    )
    with pytest.raises(ValueError, match=r"\[N, 48\], got torch.float32 \(3, 47\)"):
        ops.experts_forward(pack, hidden[:, 1:], index, weight)
    with pytest.raises(ValueError, match="float64"):
        ops.experts_forward(pack, hidden.double(), index, weight)
    with pytest.raises(ValueError, match=r"N = 3: got \(2, 2\)"):
        ops.experts_forward(pack, hidden, index[1:], weight)
    with pytest.raises(ValueError, match='gate "gelu" is not known'):
        ops.experts_forward(pack, hidden, index, weight, "gelu")
    with pytest.raises(ValueError, match="do not fit together"):
        ops.ExpertsPack(pack.up, pack.up)


def test_plans():
    assert launch.plan_for(75) == launch.PORTABLE
    assert launch.plan_for(86) == launch.PLANS[80]
    assert launch.plan_for(120) == launch.PLANS[100]
    assert all(p.shared for p in launch.PLANS.values())
    assert not launch.PORTABLE.shared
    p = launch.PLANS[90]
    assert launch.batch_of(p, 1, 8, 128) == 1
    assert launch.batch_of(p, 4, 8, 8) == 4
    assert launch.batch_of(p, 4096, 8, 128) == 0
    assert launch.segments(p, 28672, 4096, 2) == 1
    assert launch.segments(p, 1536, 2048, 8) == 4
    assert launch.segments(p, 64, 64, 1) == 1


def test_scripts_without_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("with a GPU the scripts run for minutes; this is what they say without one")
    import subprocess
    import sys
    from pathlib import Path

    for script in ("bench_gpu", "tune"):
        path = Path(__file__).parent.parent / "scripts" / script
        run = subprocess.run(
            [sys.executable, path],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(path.parent.parent)},
        )
        assert run.returncode == 2
        assert run.stderr.strip().startswith("no CUDA device")
        assert "Traceback" not in run.stderr


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize(
    "name",
    [
        "matvec 1",
        "matvec 8",
        "matvec 1 shared",
        "matvec 1 in 2 segments",
        "decode",
        "decode shared",
        "grouped dot",
        "gate",
    ],
)
def test_no_spills_on_sm90(name):
    if "shared" in name and not shared.SUPPORTED:
        pytest.skip("this Triton has no gather from shared memory")
    kernel, types, constants, options = static.kernels(90)[name]
    c = sass.compile_for(kernel, types, constants, 90, **options)
    assert c.spills == 0
    if name.startswith("matvec"):
        assert ("LDS" in c.loop) == ("shared" in name)  # where the tables are
    # beyond 128 a program of eight warps is alone on an SM, whatever it takes
    assert 0 < c.registers <= (65536 // (32 * 8) if name == "grouped dot" else 168)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
def test_batch_one_loop_is_within_its_budget():
    p = packed([sample_matrix(1024, 1024)])
    loads = {"matvec 1": 11, "matvec 1 shared": 3}  # 4 entries, 4 inputs, class, context, refill
    for name in loads if shared.SUPPORTED else ["matvec 1"]:
        kernel, types, constants, options = static.kernels(90)[name]
        c = sass.compile_for(kernel, types, constants, 90, **options)
        touched = trace(p, 0, warps=constants["W"])
        filled = (32 << constants["L"], 2 * p.width) if "ROOM" in constants else (0, 0)
        model = static.estimate(c, 4, touched, *filled)
        assert c.loop["LDG"] == loads[name]  # the right loop was counted
        assert model["instructions_per_weight"] <= static.BUDGET
        assert model["over_bf16"] > 1
        cycles = [model[f"{k}_cycles_per_symbol"] for k in ("issue", "alu", "lines")]
        if name == "matvec 1":
            assert model["binds"] == "lines"
        else:  # nothing binds alone
            assert max(cycles) < 1.1 * min(cycles)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
def test_static_study(capsys):
    result = static.run(json=True)
    assert json.loads(capsys.readouterr().out)["within_budget"]
    assert result["spills"] == 0
    assert set(result["targets"]) == {"80", "89", "90", "100", "gfx942"}
    assert "kept" in static.report(result)
