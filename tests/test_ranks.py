"""Experts dealt to ranks: every expert once, only its own bytes; the ranks add up to the layer."""

import copy

import pytest
import torch

import qmoe
from qmoe.engines.vllm.ranks import build, bytes_of, dealt, owned
from qmoe.errors import CorruptError
from qmoe.inference.cuda import run_kernels, settle
from qmoe.inference.experts import Caches
from qmoe.inference.on_cpu import run_on_cpu
from qmoe.inference.structure import build as skeleton_of
from qmoe.store.reader import Container
from qmoe.store.stored_experts import used_runs


@pytest.mark.parametrize(("experts", "size"), [(8, 2), (8, 3), (2, 4), (5, 1)])
def test_every_expert_belongs_to_one_rank(experts, size):
    own = [owned(dealt(experts, rank, size)) for rank in range(size)]
    assert sorted(e for rank in own for e in rank) == list(range(experts))
    assert max(map(len, own)) - min(map(len, own)) <= 1


def test_an_expert_map_of_another_order_is_followed():
    assert owned(torch.tensor([-1, 1, -1, 0])) == [3, 1]


def test_shared_and_overlapping_ranges_are_kept_once():
    offsets = torch.tensor([[[0, 8, 8, 20]], [[0, 8, 40, 48]], [[60, 68, 64, 72]]])
    runs, moved = used_runs(offsets)
    assert runs == [(0, 20), (40, 48), (60, 72)]
    stream = torch.arange(80)
    kept = torch.cat([stream[a:b] for a, b in runs])
    for old, new in zip(offsets.reshape(-1, 2), moved.reshape(-1, 2), strict=True):
        assert torch.equal(stream[old[0] : old[1]], kept[new[0] : new[1]])


@pytest.fixture(scope="module")
def with_biases(tmp_path_factory, tiny, write_compressed):
    """gpt-oss: experts with biases."""
    out = tmp_path_factory.mktemp("ranks") / "q"
    write_compressed(tiny.make("gpt_oss"), out)
    return out


def test_the_sum_of_the_ranks_is_the_whole_layer(with_biases):
    container = Container.open(with_biases)
    model = qmoe.load(with_biases, dtype=torch.float32)
    skeleton = skeleton_of(container)
    path, layout = next(iter(container.modules.items()))
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 64, generator=g)
    index = torch.stack([torch.randperm(layout.experts, generator=g)[:2] for _ in range(5)])
    weights = torch.rand(5, 2, generator=g)
    want = run_on_cpu(model.get_submodule(path), hidden, index, weights)
    total, kept = torch.zeros_like(want), 0
    for rank in range(2):
        numbers = dealt(layout.experts, rank, 2)
        host = copy.deepcopy(skeleton.get_submodule(path))
        module = build(container, host, path, owned(numbers), Caches(), torch.float32)
        assert module.gate_up_proj_bias.shape[0] == layout.experts // 2
        total += run_on_cpu(module, hidden, numbers[index], weights)
        kept += module.stream.nbytes
    assert torch.allclose(total, want, atol=1e-6)
    whole = container.tensors[f"{path}.stream"][2].shape[0]
    assert whole <= kept < 1.3 * whole  # more only by tables that both ranks use


def test_a_layer_settled_for_the_kernels_needs_no_streams(with_biases):
    """As vLLM loads it on a GPU; here the operators run their torch twins."""
    container = Container.open(with_biases)
    path, layout = next(iter(container.modules.items()))
    host = skeleton_of(container).get_submodule(path)
    own = owned(dealt(layout.experts, 0, 2))
    module = build(container, host, path, own, Caches(), torch.float32)
    g = torch.Generator().manual_seed(1)
    hidden, weights = torch.randn(5, 64, generator=g), torch.rand(5, 2, generator=g)
    index = torch.tensor([[0, -1], [1, 0], [-1, -1], [-1, 1], [1, -1]])
    want = run_on_cpu(module, hidden, index, weights)
    settle(module, torch.device("cpu"), 2)
    assert module.stream.numel() == module.offsets.numel() == 0
    assert torch.allclose(run_kernels(module, hidden, index, weights), want, atol=1e-5)


def test_only_the_bytes_of_ones_own_experts_are_read(with_biases, monkeypatch):
    container = Container.open(with_biases)
    path, layout = next(iter(container.modules.items()))
    read = []
    import qmoe.store.reader as reader

    plain = reader.read_tensor

    def counted(file, start, entry):
        read.append(entry.end - entry.begin)
        return plain(file, start, entry)

    monkeypatch.setattr(reader, "read_tensor", counted)
    some = container.some_experts(path, [1])
    offsets = layout.experts * len(layout.projections) * 4 * 8
    assert sum(read) == some.stream.numel() + offsets
    whole = container.tensors[f"{path}.stream"][2].shape[0]
    assert some.stream.numel() < 0.6 * whole
    everything = container.experts(path)
    for j in range(len(layout.projections)):
        assert torch.equal(some.dense(0, j), everything.dense(1, j))


def test_offsets_outside_of_the_stream_are_refused(with_biases, monkeypatch):
    container = Container.open(with_biases)
    path = next(iter(container.modules))
    plain = Container.read

    def damaged(self, name):
        found = plain(self, name)
        if name.endswith(".offsets"):
            found[0, 0, 3] = 1 << 40
        return found

    monkeypatch.setattr(Container, "read", damaged)
    with pytest.raises(CorruptError, match="of a stream of"):
        container.some_experts(path, [1])


def test_a_rank_without_experts_keeps_nothing():
    assert owned(dealt(2, 3, 4)) == []
    assert bytes_of(None) == 0
