"""A rank's experts as vLLM keeps them on a GPU: settled for the kernels, streams dropped, warmed up
and then captured; the kernels are executed as PTX (`ptx`)."""

import copy
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from ptx.launch import executed

from qmoe.engines.vllm.ranks import build, dealt, owned
from qmoe.inference.cuda import run_kernels, settle
from qmoe.inference.experts import Caches, run_on_cpu
from qmoe.inference.structure import build as skeleton_of
from qmoe.kernels import selfcheck
from qmoe.store.reader import Container

RANKS, TOP_K, WIDTH = 2, 2, 64
ASKED = ("item", "tolist", "cpu", "nonzero", "unique", "__bool__", "__int__", "__float__")


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def checkpoint(request, tmp_path_factory, tiny, write_compressed):
    """SwiGLU, which has kernels of its own; and experts with biases and another gate."""
    out = tmp_path_factory.mktemp(request.param) / "q"
    write_compressed(tiny.make(request.param, hidden_size=WIDTH), out)
    return Container.open(out)


@pytest.fixture
def fresh_verdict(monkeypatch):
    """The kernels are checked again when the first layer is settled."""
    monkeypatch.setattr(selfcheck, "_verdicts", {})


def _ranks(container):
    """Of each rank: a layer's experts, and their local numbers (-1: another's, or none)."""
    path, layout = next(iter(container.modules.items()))
    host = skeleton_of(container).get_submodule(path)
    for rank in range(RANKS):
        index = dealt(layout.experts, rank, RANKS)
        yield (
            build(container, copy.deepcopy(host), path, owned(index), Caches(), torch.bfloat16),
            torch.cat([index, index.new_full((1,), -1)]),
        )


def _inputs(tokens, experts):
    """Activations, experts (the last id is none) and weights."""
    g = torch.Generator().manual_seed(tokens)
    index = torch.stack([torch.randperm(experts + 1, generator=g)[:TOP_K] for _ in range(tokens)])
    return torch.randn(tokens, WIDTH, generator=g).bfloat16(), index, torch.rand(tokens, TOP_K)


@contextmanager
def _captured(session):
    """What a captured graph cannot hold fails: a value asked by the host, a kernel not compiled."""
    compiled = {launch.kernel.hash for launch in session.launches}
    first = len(session.launches)

    def asked(*_, **__):
        raise AssertionError("the host waits for the device")

    with mock.patch.multiple(torch.Tensor, **dict.fromkeys(ASKED, asked)):
        yield
    assert {launch.kernel.hash for launch in session.launches[first:]} <= compiled
    assert len(session.launches) > first


def test_ranks_add_up_to_the_layer_and_can_be_captured(checkpoint, fresh_verdict):
    layout = next(iter(checkpoint.modules.values()))
    batches = [_inputs(tokens, layout.experts) for tokens in (1, 3)]
    want, got = [0] * len(batches), [0] * len(batches)
    for module, mine in _ranks(checkpoint):
        held = module.stream.nbytes
        for i, (hidden, index, weights) in enumerate(batches):
            want[i] += run_on_cpu(module, hidden.float(), mine[index], weights)
        with executed(90) as session:
            settle(module, torch.device("cpu"), TOP_K)
            assert selfcheck._verdicts  # the first layer proved the kernels
            assert held > 0 == module.stream.numel() == module.offsets.numel()
            for i, (hidden, index, weights) in enumerate(batches):
                run = (module, hidden, mine[index], weights)
                warm = run_kernels(*run)
                with _captured(session):
                    again = run_kernels(*run)
                assert torch.equal(again, warm)
                got[i] += again.float()
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() < 1e-2 * b.norm()
