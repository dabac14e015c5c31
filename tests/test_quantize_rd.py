"""What `rd` aims at and what it borrows."""

from dataclasses import replace

import pytest
import torch
from test_quantize import dequantized, make_problem
from torch import Tensor

from qmoe.quantize import get_method
from qmoe.quantize.rd import Options, regular


def test_the_target_makes_good_what_is_owed():
    """Outputs of the quantized matrix come nearer to those wanted, which are not the original's."""
    problem = make_problem(tokens=(600, 400))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 500, 70, generator=generator)
    h = x.mT @ x
    wanted = 0.2 * torch.randn(2, 48, 70, generator=generator)
    problem = replace(problem, hessian=h, cross=h.clone(), layer_hessian=h.sum(0))
    solved = [
        dequantized(get_method("rd", delta=1.0).solve(p))
        for p in (problem, replace(problem, owed=wanted @ h))
    ]

    def distance(w: Tensor) -> Tensor:
        d = w - problem.weight - wanted
        return ((d @ h) * d).sum((1, 2))

    assert (distance(solved[1]) < 0.2 * distance(solved[0])).all()


def test_the_fewer_tokens_the_more_of_the_layer():
    problem = make_problem(tokens=(7000, 70, 7))
    evidence = problem.hessian.double()
    h, own = regular(problem, evidence, Options(1.0, shrinkage=1.0, damping=0.0))
    assert own.tolist() == pytest.approx([1 / 1.01, 1 / 2, 1 / 11])

    def trace(t: Tensor) -> Tensor:
        return t.diagonal(dim1=-2, dim2=-1).sum(-1)

    assert torch.allclose(trace(h), trace(evidence))  # what is rarely used stays unimportant
    layer = problem.layer_hessian.double() / problem.layer_hessian.double().trace()
    away = [float((t / t.trace() - layer).norm()) for t in h]
    before = [float((t / t.trace() - layer).norm()) for t in evidence]
    assert [a / b for a, b in zip(away, before, strict=True)] == pytest.approx(own.tolist())
