"""peft on a compressed model: LoRA on attention trains and merges; on experts it is refused."""

import peft
import pytest
import torch

import qmoe
from qmoe.errors import UnsupportedModelError
from qmoe.inference import experts
from qmoe.inference.cuda import run_kernels
from qmoe.inference.experts import EncodedExperts


@pytest.fixture(params=["cpu", "gpu operators"])
def backend(request, monkeypatch):
    """What runs the experts: the compiled loops, or the operators of a GPU as torch twins."""
    if request.param != "cpu":
        monkeypatch.setitem(experts.BACKENDS, "cpu", run_kernels)


def _batch(model):
    g = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.vocab_size, (2, 12), generator=g)


def _losses(model, ids, steps):
    tuned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(tuned, lr=1e-2)
    found = []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_lora_on_attention_trains_saves_and_merges(compressed, tmp_path, backend):
    out, _ = compressed
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=True)
    model = peft.get_peft_model(qmoe.load(out), config)
    ids = _batch(model)
    losses = _losses(model, ids, 6)
    assert losses[-1] < losses[0] - 0.1
    model.eval()
    with torch.no_grad():
        trained = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(qmoe.load(out), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, trained, atol=1e-5)
        merged = again.merge_and_unload()
        assert any(isinstance(m, EncodedExperts) for m in merged.modules())
        assert torch.allclose(merged(ids).logits, trained, atol=1e-4)


def test_gradients_pass_through_the_experts(compressed, backend):
    """A layer below the last learns only through the experts above it."""
    out, _ = compressed
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[0])
    model = peft.get_peft_model(qmoe.load(out), config)
    ids = _batch(model)
    model(ids, labels=ids).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert any(g is not None and g.abs().max() > 0 for g in grads)


@pytest.mark.parametrize("name", ["mlp.experts.gate_up_proj", "down_proj"])
def test_adapters_on_encoded_experts_are_refused(compressed, name):
    out, _ = compressed
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=[name])
    with pytest.raises(UnsupportedModelError, match="is encoded and cannot be trained"):
        peft.get_peft_model(qmoe.load(out), config)


def test_a_dense_model_is_left_alone(build_model):
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    model = peft.get_peft_model(build_model("mixtral"), config)
    assert any("experts" in n for n, p in model.named_parameters() if p.requires_grad)
