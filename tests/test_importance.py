"""The importance of layers is what a small error of their experts' output costs in KL."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qmoe.calib.importance import layer_importance
from qmoe.models.streamed import StreamedModel
from qmoe.source.checkpoint import open_checkpoint

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MODEL = EXAMPLES / "tiny-mixtral"


@pytest.fixture(scope="module")
def batches():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = (EXAMPLES / "text" / "calib.txt").read_text()[:6000]
    ids = tokenizer(text, return_tensors="pt").input_ids[0][: 8 * 128]
    return [{"input_ids": i} for i in ids.reshape(2, 4, 128)]


def _importance(batches):
    streamed = StreamedModel(open_checkpoint(str(MODEL)))
    streamed.load_rest()
    return layer_importance(streamed, batches)


def test_importance_is_the_cost_of_noise_in_kl(batches):
    found = _importance(batches)
    model = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    ids = torch.cat([b["input_ids"] for b in batches])
    noise = torch.Generator().manual_seed(1)
    size = 1e-4  # larger noise sends tokens to other experts, which a gradient does not see

    def logp() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits.log_softmax(-1)

    plain = logp()
    cost = {}
    for path in found:

        def disturb(_, __, out):
            return out + size * torch.randn(out.shape, generator=noise, dtype=out.dtype)

        handle = model.get_submodule(path).register_forward_hook(disturb)
        cost[path] = float((plain.exp() * (plain - logp())).sum(-1).mean())
        handle.remove()
    assert len(cost) == 4
    want = torch.tensor([cost[path] for path in found], dtype=torch.float64)
    want = want / want.log().mean().exp()
    got = torch.tensor(list(found.values()), dtype=torch.float64)
    assert got.max() > 1.1 * got.min()  # layers differ, or this shows nothing
    assert (got / want).log2().abs().max() < 0.3, (found, want)


def test_the_order_of_sums_does_not_reach_the_importance(batches, monkeypatch):
    found = _importance(batches)
    softmax = torch.Tensor.softmax

    def rounded(x, *a, **k):  # another order of sums, exaggerated
        return softmax(x * (1 + 1e-6 * torch.rand(x.shape)), *a, **k)

    monkeypatch.setattr(torch.nn.functional, "softmax", rounded)
    exact = _importance(batches)
    monkeypatch.undo()
    assert exact == found
