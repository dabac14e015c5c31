"""The kernels' compiled PTX, executed on the CPU with every access checked (`ptx`): partial sums
bit for bit, products against the twins, hostile words, limits of a launch; and that the checks
refuse what is wrong.
"""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from ptx import exact
from ptx.faults import Fault
from ptx.launch import executed
from safetensors import safe_open

from qmoe.kernels import launch, ops, pair_groups, project, twins
from qmoe.kernels.pack import pack_projection
from qmoe.kernels.selfcheck import plain
from qmoe.measure.kernels import gpu as bench
from qmoe.measure.kernels.sample import packed, parsed, sample_matrix
from qmoe.measure.kernels.sample import rough_matrix as matrix
from qmoe.types import QuantizedMatrix, grid_index, grid_scale

INDEX = torch.tensor([0, 0, -1, 1, 99, 0, 0, 0, 0, 0])  # an empty place, a stranger, a hot expert
TARGETS = (80, 90, 100, 120)
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "tiny-mixtral"


def several(rows, cols, size=0.4, negative=False, count=2):
    return [matrix(rows, cols, size, negative, seed=s) for s in range(count)]


def real(rows, cols):
    """Of the class mix of real experts at 0.8 bit."""
    return [sample_matrix(rows, cols, 0.8, seed) for seed in range(2)]


def mixed():
    """Experts of 7-bit and of wide 10-bit codes in one projection."""
    first, rest = parsed(several(40, 90), 8), parsed(several(40, 90, 20.0), 10)
    return pack_projection([*first, *rest], 3)


# few numbers of segments, as each is a kernel of its own to compile
CASES = {  # name: (projection, its code limits, wide)
    "ragged": (lambda: packed(several(33, 17, count=3)), (7,), False),
    "one weight": (lambda: packed([matrix(1, 1, 3.0)]), (7,), False),
    "zeros": (lambda: packed([matrix(5, 40, 0.0)], 3), (7,), False),
    "0.8 bit": (
        lambda: packed([sample_matrix(140, 200, 0.8, s) for s in range(2)], 3),
        (7,),
        False,
    ),
    "4 bit": (lambda: packed(several(70, 130, 5.0), 1), (7,), False),
    "10 bits": (lambda: packed(several(40, 200, 0.6), 3, 10), (10,), False),
    "12 bits": (lambda: packed(several(40, 200, 0.6), 1, 12), (12,), False),
    "wide, 10 bits": (lambda: packed(several(40, 40, 20.0), 3, 10), (10,), True),
    "wide, 12 bits": (lambda: packed(several(40, 30, 20.0), 3, 12), (12,), True),
    "two row scales": (lambda: packed(several(40, 300, negative=True), 3), (7,), False),
    "two pieces": (lambda: packed([matrix(37, 1030, 0.3)], 3), (7,), False),
    "far starts": (lambda: packed(several(40, 300, 20.0), 3, 8), (7,), False),
    "8 segments": (lambda: packed(several(70, 130, 1.0), 8), (7,), False),
    "mixed limits": (mixed, (7, 10), True),
}
BRIEF = ("0.8 bit", "wide, 12 bits", "two row scales")


def check_partial_sums(p, session, dtype, batch, plan):
    """Every partial sum of the groups of INDEX has the defined bits."""
    index = torch.where(INDEX == 1, p.experts - 1, INDEX)
    x = torch.randn(5, p.cols, generator=torch.Generator().manual_seed(batch)).to(dtype)
    groups = project.make_groups(index, p.experts, batch)
    if batch > 1:
        want = pair_groups.group_pairs_torch(index, p.experts, batch)
        for got, expected in zip((groups.expert, groups.members, groups.slots), want, strict=True):
            assert torch.equal(got, expected)
    members = torch.arange(len(index))[:, None] if batch == 1 else groups.members
    kind = project.inputs_type(x)
    results = {
        "as launched": project.first_sums(p, x, groups, 2, plan),
        "inputs first": project.partial_sums(
            p, project.gathered(p, x, groups, 2, plan), groups, plan
        ),
    }
    if plan.shared:
        results["plain"] = project.first_sums(p, x, groups, 2, plain(plan))
    for g, e in enumerate(groups.expert.tolist()):
        if 0 <= e < p.experts:
            xs = torch.zeros(p.pieces, p.width, batch)
            for b, pair in enumerate(members[g].tolist()):
                if pair >= 0:
                    xs[:, :, b] = exact.scaled_inputs(p, x, e, pair // 2, kind).float()
            want = exact.partial_sums(p, xs.numpy(), e).view(np.uint32)
            for how, got in results.items():
                assert np.array_equal(got[g].numpy().view(np.uint32), want), (how, dtype, batch)


def check_projection(p, session, plan, kinds):
    for e in range(p.experts):
        want = twins.weights_torch(p, e)
        assert torch.equal(project.weights(p, e), want)
        assert torch.equal(project.weights(p, e, plan=plain(plan)), want)
    for dtype, batches in kinds:
        for batch in batches:
            check_partial_sums(p, session, dtype, batch, plan)
        x = torch.randn(5, p.cols).to(dtype)
        want = twins.project_torch(p, x, INDEX, 2)
        # partial sums of all batches have the same bits by now
        each = [project.project(p, x, INDEX, 2, batch=b) for b in {batches[0], batches[-1]}]
        for y in each:
            assert bench.relative_rms(y, want) < bench.TOLERANCE[dtype]
            assert torch.equal(y, each[0])
            assert not y[[2, 4]].any()


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_matrix(name):
    make, limits, wide = CASES[name]
    p = make()
    assert (p.limits, p.wide) == (limits, wide)  # the case is what its name says
    kinds = ((torch.bfloat16, (1, 4)), (torch.float32, (1,)))
    if name == "0.8 bit":
        kinds = ((torch.bfloat16, (1, 2, 4, 8)), (torch.float16, (1,)), (torch.float32, (1, 8)))
    with executed(90) as session:
        check_projection(p, session, launch.PLANS[90], kinds)


@pytest.mark.parametrize(("steps", "limit"), [(1.6, None), (0.12, 10)])
def test_real_experts(steps, limit):
    """Experts of the example model, rounded to `steps` standard deviations of each row."""
    matrices = []
    with safe_open(EXAMPLE / "model.safetensors", "pt") as file:
        for e in range(2):
            w = file.get_tensor(f"model.layers.1.block_sparse_moe.experts.{e}.w1.weight").float()
            index = grid_index(w.std(1) * steps, step=4)
            codes = (w / grid_scale(index)[:, None]).round().clamp(-127, 127).to(torch.int8)
            matrices.append(QuantizedMatrix(codes, index, torch.zeros(256, dtype=torch.int16)))
    p = packed(matrices, 2, limit)
    assert p.limits == (7 if limit is None else limit,)
    with executed(90) as session:
        check_projection(p, session, launch.PLANS[90], ((torch.bfloat16, (1, 4)),))


@pytest.mark.parametrize("capability", [t for t in TARGETS if t != 90])
@pytest.mark.parametrize("name", BRIEF)
def test_every_target(capability, name):
    with executed(capability) as session:
        kinds = ((torch.bfloat16, (1,)),)
        if name == "0.8 bit":
            kinds = ((torch.bfloat16, (1, 8)), (torch.float16, (1,)), (torch.float32, (4,)))
        check_projection(CASES[name][0](), session, launch.plan_for(capability), kinds)


@pytest.mark.parametrize("capability", TARGETS)
def test_grouped_product(capability):
    p = packed([sample_matrix(140, 70, 0.8, seed=s) for s in range(2)], 2)
    with executed(capability) as session:
        for dtype in (torch.bfloat16, torch.float32) if capability != 100 else (torch.float32,):
            x = torch.randn(5, p.cols).to(dtype)
            want = twins.project_torch(p, x, INDEX, 2)
            y = project.project(p, x, INDEX, 2, batch=0)
            assert bench.relative_rms(y, want) < bench.TOLERANCE[dtype]
            assert not y[[2, 4]].any()
            scattered = plain(launch.plan_for(capability))
            assert torch.equal(y, project.project(p, x, INDEX, 2, scattered, 0))
    names = {launched.name for launched in session.launches}
    assert names >= {"decode_shared", "decode_active", "zero_active", "grouped_dot"}


def test_a_tile_is_written_whole():
    """Nothing is emptied before `decode_shared`: what has no code gets a zero from it, deep pieces
    and rows that do not fill a tile too.
    """
    p = packed([matrix(37, 1030, 0.3, seed=s) for s in range(2)], 3)
    with executed(90) as session:
        codes = torch.full((2, p.rows, p.pieces, 1088), 99, dtype=torch.int8)
        project.decode_experts(p, codes, torch.ones(2), 0, launch.PLANS[90], ratio=True)
    assert {launched.name for launched in session.launches} == {"decode_shared"}
    for e in range(2):
        depth = p.stored - 1
        found = torch.nn.functional.pad(codes[e, :, :, :depth].float(), (1, 0))
        assert torch.equal(twins.dense_of(p, e, found), twins.weights_torch(p, e))
        assert not codes[e, :, :, depth:].any()


def layer(experts=4, hidden=48, inner=40):
    up = packed([matrix(2 * inner, hidden, seed=s) for s in range(experts)])
    down = packed([matrix(hidden, inner, seed=9 + s) for s in range(experts)], 2)
    return ops.ExpertsPack(up, down)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_layer(capability, dtype):
    pack = layer()
    hidden, weight = torch.randn(3, 48).to(dtype), torch.rand(3, 2)
    index = torch.tensor([[0, 1], [1, 0], [1, 7]])  # the last is no expert
    want = ops.twin(pack, hidden, index, weight, ops.silu_gate)
    with executed(capability):
        one, four = (ops._fused(pack, hidden, index, weight, b) for b in (1, 4))
        composed = ops.experts_forward(pack, hidden, index, weight, ops.silu_gate)
    assert torch.equal(one, four)
    for y in (one, composed):
        assert bench.relative_rms(y, want) < bench.TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_layer_of_one_token_is_four_launches(dtype):
    pack = layer()
    hidden, index, weight = torch.randn(1, 48).to(dtype), torch.tensor([[2, 0]]), torch.rand(1, 2)
    with executed(90) as session:
        ops.experts_forward(pack, hidden, index, weight)
    names = [launched.name for launched in session.launches]
    assert names == ["matvec_shared", "silu_inputs", "matvec_shared", "sum_tokens"]
    # the first one's inputs are somebody else's work, the others overlap
    assert [launched.dependent for launched in session.launches] == [False, True, True, True]


def test_experts_that_do_not_exist_are_waited_for_too():
    pack = layer()
    hidden, weight = torch.randn(2, 48).bfloat16(), torch.rand(2, 2)
    with executed(90):
        y = ops.experts_forward(pack, hidden, torch.full((2, 2), 1 << 32), weight)
    assert not y.any()


def test_one_kernel_for_many_numbers_of_pairs():
    pack = layer()
    with executed(90) as session:
        session.dry = True
        for tokens in (2, 3, 4, 5, 6, 7, 8, 11, 13, 16, 17, 24, 29, 31, 32):
            hidden, weight = torch.randn(tokens, 48).bfloat16(), torch.rand(tokens, 2)
            for batch in (2, 4):
                ops._fused(pack, hidden, torch.zeros(tokens, 2, dtype=torch.long), weight, batch)
    variants = {}
    for launched in session.launches:
        variants.setdefault(launched.name, set()).add(launched.kernel.hash)
    assert {name: len(v) for name, v in variants.items()} == {
        "group_small": 2,
        "gather_inputs": 2,
        "matvec_shared": 4,
        "silu_inputs": 2,
        "sum_tokens": 2,
    }  # fmt: skip -- two numbers of tokens a pass


def test_grids_of_a_long_prompt_are_within_the_limits():
    p = packed(several(40, 90))
    tokens = 8192
    with executed(90) as session:
        session.dry = True
        index = torch.arange(8 * tokens + 1) % 2
        x = torch.randn(tokens + 1, 90).bfloat16()
        for batch in (0, 1):
            project.project(p, x, index, 8, batch=batch)
        ops._fused(
            layer(), torch.randn(70000, 48), torch.zeros(70000, 2).long(), torch.rand(70000, 2), 1
        )
    assert max(launched.grid[0] for launched in session.launches) > 65535


@pytest.mark.parametrize("kind", ["random", "zeros", "ones", "damaged"])
@pytest.mark.parametrize("name", ["0.8 bit", "two row scales", "wide, 12 bits", "one weight"])
def test_hostile_words_never_leave_a_tensor(kind, name):
    p = CASES[name][0]()
    g = torch.Generator().manual_seed(len(kind))
    random = torch.randint(-(2**31), 2**31 - 1, p.words.shape, generator=g).int()
    words = {
        "random": random, "zeros": torch.zeros_like(random), "ones": torch.full_like(random, -1),
        "damaged": torch.where(torch.rand(random.shape, generator=g) < 0.02, random, p.words),
    }[kind]  # fmt: skip
    p = dataclasses.replace(p, words=words)
    x = torch.randn(5, p.cols, generator=g).bfloat16()
    with executed(90) as session:
        for plan in (launch.PLANS[90], plain(launch.PLANS[90])):
            project.project(p, x, INDEX, 2, plan, 1)
        for plan in (launch.PLANS[90], plain(launch.PLANS[90])):
            session.launches.clear()
            try:
                project.weights(p, 0, plan=plan)
                tile = session.launches[-1].name == "decode_shared"
                assert tile == (plan.shared and name in ("0.8 bit", "one weight"))
            except Fault as fault:  # segments of a torn stream may meet, in the scratch alone
                met = re.search(r"meets a write of thread \d+ to out without", str(fault))
                if p.segments == 1 or not met or not str(fault).startswith("decode_active"):
                    raise
