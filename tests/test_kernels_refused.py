"""A check that cannot fail is no check: faults put into the kernels' PTX, and tensors that lie, are
refused by the execution of `ptx`.
"""

import dataclasses
import re

import numpy as np
import pytest
import torch
from ptx import exact
from ptx.faults import Fault
from ptx.launch import executed

from qmoe.kernels import launch, ops, project
from qmoe.kernels.interleave import FAR_BITS
from qmoe.kernels.selfcheck import plain
from qmoe.measure.kernels.sample import packed, sample_matrix
from qmoe.measure.kernels.sample import rough_matrix as matrix

INDEX = torch.tensor([0, 1, 1, 0, 1, -1])
PLAN = launch.PLANS[90]


def projection():
    return packed([sample_matrix(140, 300, 0.8, s) for s in range(2)], 4)


def run_product(plan):
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    return project.project(projection(), x, INDEX, 2, plan, 1)


def run_layer(batch):
    up = packed([matrix(80, 48, seed=s) for s in range(4)])
    down = packed([matrix(48, 40, seed=9 + s) for s in range(4)], 2)
    hidden, index = torch.randn(1, 48).bfloat16(), torch.tensor([[2, 0]])
    return ops._fused(ops.ExpertsPack(up, down), hidden, index, torch.rand(1, 2), batch)


RUNS = {
    "matvec_shared": lambda: run_product(PLAN),
    "matvec": lambda: run_product(plain(PLAN)),
    "silu_inputs": lambda: run_layer(1),
    "group_small": lambda: run_layer(2),
}
BARRIER, WAIT = r"bar\.sync\s+0;", r"griddepcontrol\.wait\s*;"
PASS_BY = (
    "mov.u32 %r7000, %tid.x; setp.lt.u32 %p7000, %r7000, 64; @%p7000 bra $L__X;\n"
    "bar.sync 0;\n$L__X:\n"
)
VECTOR = r"ld\.global\.v4\.b32 (\{[^}]*\}), \[ (%rd\d+) \+ 0 \]"
STORE = r"st\.global\.b32 \[ (%rd\d+) \+ 0 \]"
MUTATIONS = {  # name: (kernel, pattern, what is put there, count (0 = all), what the refusal says)
    "no barrier": ("matvec_shared", BARRIER, "", 0, "races|before it is written"),
    "half of the tables not copied": (
        *("matvec_shared", r"st\.shared\.v4\.b32\s+\[%r\d+\+?\d*\][^;]*;", "", 1),
        "before it is written",
    ),
    "a copy 8 bytes off": (
        *("matvec_shared", VECTOR, r"ld.global.v4.b32 \1, [ \2 + 8 ]", 1),
        "not a multiple",
    ),
    "an index that leaves the array": (
        *("matvec_shared", r"shl\.b32( \t%r\d+, %r\d+), 1;", r"shl.b32\1, 9;", 0),
        "shared",
    ),
    "half of the threads pass by the barrier": (
        "matvec_shared",
        BARRIER,
        PASS_BY,
        1,
        "barrier|races",
    ),
    "sums far behind": (
        *(
            "matvec_shared",
            r"st\.global\.b32 \[ (%rd\d+) \+ 0 \]",
            r"st.global.b32 [ \1 + 65536 ]",
            0,
        ),
        "of partial",
    ),
    "a pointer one size too wide": (
        *("matvec", r"mul\.wide\.u32 t, (%r\d+), (%r\d+)", r"mul.wide.u32 t, \1, 4096", 0),
        "byte|multiple|tensor",
    ),
    "groups without barriers": ("group_small", BARRIER, "", 0, "barrier|races|written"),
    "no wait for the launch in front": ("silu_inputs", WAIT, "", 0, "has waited"),
    "dependents let go too early": (
        *("silu_inputs", WAIT, "griddepcontrol.launch_dependents; griddepcontrol.wait;", 0),
        "before this one has waited",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_in_the_code(name):
    kernel, pattern, to, count, message = MUTATIONS[name]

    def changed(text):
        new, found = re.subn(pattern, to, text, count=count)
        assert found, "the mutation has nothing to change"
        return new

    with executed(90) as session:
        session.change[kernel] = changed
        with pytest.raises(Fault, match=message):
            RUNS[kernel]()


def test_words_without_their_tail():
    p = projection()
    p = dataclasses.replace(p, words=p.words[: int(p.records[:, :, 0].max()) // 2].clone())
    with executed(90), pytest.raises(Fault, match="of words"):
        project.project(p, torch.randn(3, 300).bfloat16(), INDEX, 2, batch=1)


def test_a_cut_behind_the_words():
    p = projection()
    cuts = p.cuts.clone()
    cuts[1, 0, 1, 2] = 60000 << FAR_BITS
    p = dataclasses.replace(p, cuts=cuts)
    with executed(90), pytest.raises(Fault, match="of words"):
        project.project(p, torch.randn(3, 300).bfloat16(), INDEX, 2, batch=1)


@pytest.mark.parametrize("off", [1, 256])  # a position, a bit
def test_a_start_that_is_off_is_noticed(off):
    p = projection()
    groups = project.make_groups(INDEX, p.experts, 1)
    x = torch.randn(3, 300).bfloat16()
    starts = p.starts.clone()
    starts[1, 3] += off
    wrong = dataclasses.replace(p, starts=starts)
    xs = torch.stack([exact.scaled_inputs(p, x, e, t // 2, x.dtype) for t, e in enumerate([0, 1])])
    with executed(90):
        sums = project.first_sums(wrong, x, groups, 2, PLAN)
    for g, e in enumerate((0, 1)):
        want = exact.partial_sums(p, xs[g, ..., None].float().numpy(), e)
        assert np.array_equal(sums[g].numpy(), want) == (e == 1)  # starts[1] is of expert 0


def test_a_row_that_is_missing():
    p = projection()
    lanes = p.lanes.clone()
    lanes[0, 0, 0] += 1 << 10  # beyond the rows: masked, so that a sum is not written
    p = dataclasses.replace(p, lanes=lanes)
    with (
        executed(90),
        pytest.raises(Fault, match="loads bytes of partial that nothing has written"),
    ):
        project.project(p, torch.randn(3, 300).bfloat16(), INDEX, 2, batch=1)


def test_a_grid_beyond_the_limits():
    with executed(90), pytest.raises(Fault, match="a grid of"):
        project.sums.sum_partials[(1, 65536)](
            torch.zeros(1), INDEX, torch.zeros(1), 1, 1,
            SLOTS=1, B=1, BLOCK=256, DIRECT=True, num_warps=4,
        )  # fmt: skip
