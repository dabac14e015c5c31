"""What the residual stream has lost before a layer, and that its experts make a part of it good."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from qmoe.calib.activations import ActivationStore
from qmoe.calib.lost import added, lost, share
from qmoe.calib.outputs import Resident
from qmoe.calib.routing import Parked, park
from qmoe.calib.walk import Walk
from qmoe.models.streamed import StreamedModel
from qmoe.source.checkpoint import open_checkpoint
from qmoe.system.processes import World


def _before_the_second_block(tiny, folder, family, **changes):
    """A model with its second block resident, and two walks that come to it, the second of the two
    with inputs of its own."""
    where = tiny.save(family, folder, num_hidden_layers=2, **changes)
    streamed, store = StreamedModel(open_checkpoint(str(where))), ActivationStore(2**30)
    streamed.load_rest()
    first, second = list(streamed.blocks())[:2]
    walks = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        ids = [torch.randint(3, 100, (n, 16), generator=generator) for n in (3, 2)]
        walks.append(Walk(streamed, [{"input_ids": i} for i in ids], Resident(store)))
    for block in (first, second):
        streamed.load_block(block, set())
    for walk in walks:
        walk.run(first)
    (layout, module), *_ = streamed.experts_of(second)
    width = layout.projections[-1].rows
    parked = [park(w, second, layout.path, module, width, store, World()) for w in walks]
    return SimpleNamespace(
        walks=walks, block=second, module=module, parked=parked[0], store=store, first=first
    )


@pytest.mark.parametrize(
    ("family", "changes", "factor"),
    [
        ("mixtral", {}, 1.0),
        ("deepseek_v3", {"first_k_dense_replace": 0}, 1.0),
        ("granitemoe", {"residual_multiplier": 0.22}, 0.22),
    ],
)
def test_a_block_is_asked_whether_it_adds_its_experts_answers(
    family, changes, factor, tiny, tmp_path
):
    at = _before_the_second_block(tiny, tmp_path, family, **changes)
    assert added(at.walks[0], at.block, at.module, at.parked) == pytest.approx(factor)
    at.walks[0].finished.clear()
    assert added(at.walks[0], at.block, at.module, at.parked) == 0  # nothing before the first


def test_answers_that_a_norm_changes_are_left_alone(tiny, tmp_path):
    at = _before_the_second_block(tiny, tmp_path, "mixtral")
    at.block.module.mlp.register_forward_hook(lambda m, a, y: F.rms_norm(y, y.shape[-1:]))
    assert added(at.walks[0], at.block, at.module, at.parked) == 0


def test_what_is_lost_is_the_difference_of_the_streams(tiny, tmp_path):
    at = _before_the_second_block(tiny, tmp_path, "mixtral")
    rows = lost(at.walks, at.block, at.parked, 0.5, at.store, World())
    streams = [
        torch.cat([w.before(at.block.list_name, n).flatten(0, -2) for n in range(2)])
        for w in at.walks
    ]
    assert torch.equal(rows, (streams[1] - streams[0]) / 0.5)
    assert rows.abs().max() > 0


def test_shares_of_a_tokens_experts_add_up_to_one():
    index = torch.tensor([[0, 1], [2, 4], [1, 2]], dtype=torch.int32)  # 4 and beyond: not used
    weight = torch.tensor([[0.7, 0.1], [0.3, 9.0], [0.2, 0.2]])
    p = Parked(torch.zeros(3, 4), index, weight, [3], torch.zeros(3, 2, 4))
    token = torch.arange(3)
    total = torch.zeros(3)
    for e in range(4):
        rows, slot = p.slots(e)
        part = share(p, 4, e, token)
        assert part.nonzero().flatten().tolist() == rows.tolist()
        total[rows] += part[rows] * weight[rows, slot]
    assert total.tolist() == pytest.approx([1, 1, 1])
