"""On a real GPU, what the other tests can only execute or interpret: whole models against the CPU,
graphs, generation, training. All are skipped where there is no GPU.

    pytest tests/test_cuda.py
"""

import json
from pathlib import Path

import checkpoints
import peft
import pytest
import torch

import qmoe
from qmoe.inference import cuda
from qmoe.inference.experts import EncodedExperts
from qmoe.kernels import selfcheck
from qmoe.kernels.launch import plan_of
from qmoe.measure.kernels import gpu as bench

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = "cuda"
TOY = Path(__file__).parent.parent / "examples" / "tiny-domains"
TEXT = Path(__file__).parent.parent / "examples" / "text" / "domains"


@pytest.fixture(autouse=True)
def exact_products():
    """float32 products of torch as exact as the CPU's, so that the two can be compared."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The trained example, rounded in a few seconds."""
    out = tmp_path_factory.mktemp("toy") / "out"
    qmoe.compress(
        str(TOY), out, qmoe.Settings(method="rtn", calib_tokens=4096, ctx=256, device="cpu")
    )
    return out


def moved(inputs):
    return {k: v.to(GPU) for k, v in inputs.items()}


@torch.no_grad()
def test_every_family_gives_the_logits_of_the_cpu(
    family, build_model, write_compressed, model_inputs, tmp_path
):
    model = build_model(family)
    write_compressed(model, tmp_path / "out")
    inputs = model_inputs(model)
    want = qmoe.load(tmp_path / "out", dtype=torch.float32)(**inputs, use_cache=False).logits
    there = qmoe.load(tmp_path / "out", dtype=torch.float32, device_map=GPU)
    got = there(**moved(inputs), use_cache=False).logits.cpu()
    assert any(cuda.PACK in m.__dict__ for m in there.modules())
    assert (got - want).abs().max() <= 2e-4 * want.abs().max()
    halved = qmoe.load(tmp_path / "out", dtype=torch.bfloat16, device_map=GPU)
    assert halved(**moved(inputs), use_cache=False).logits.isfinite().all()


def test_the_kernels_are_trusted_and_right(toy):
    assert bench.check() == []
    assert plan_of(torch.device(GPU, 0)).shared
    model = qmoe.load(toy, device_map=GPU)
    assert selfcheck._verdicts
    assert all(selfcheck._verdicts.values())
    modules = [m for m in model.modules() if isinstance(m, EncodedExperts)]
    assert all(m.stream.device.type == "cpu" for m in modules)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_are_those_of_the_cpu(toy, dtype):
    text = str(TEXT / "dev_en.txt")
    how = {"tokens": 2048, "ctx": 256, "dtype": dtype}
    here = qmoe.evaluate(str(toy), text, device="cpu", **how)
    there = qmoe.evaluate(str(toy), text, device=GPU, **how)
    bound = 1e-4 if dtype == "float32" else 1e-2
    assert abs(there.perplexity / here.perplexity - 1) < bound


def test_tokens_by_every_way_of_generating(toy):
    model = qmoe.load(toy, dtype=torch.float32)
    ids = torch.randint(3, 200, (2, 5), generator=torch.Generator().manual_seed(0))
    plainly = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, **plainly)
    model = model.to(GPU)
    assert torch.equal(model.generate(ids.to(GPU), **plainly).cpu(), want)
    got = model.generate(ids.to(GPU), cache_implementation="static", **plainly)  # compiled unasked
    assert torch.equal(got.cpu(), want)


@torch.no_grad()
def test_a_graph_replays_what_it_captured(toy):
    model = qmoe.load(toy, dtype=torch.bfloat16, device_map=GPU)
    ids = torch.randint(3, 200, (1, 4), device=GPU)
    model(ids, use_cache=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(ids, use_cache=False).logits
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        ids.copy_(torch.randint(3, 200, (1, 4), generator=g))
        graph.replay()
        again = logits.clone()
        assert torch.equal(again, model(ids, use_cache=False).logits)


def test_adapters_train_through_the_kernels(toy):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[0])
    losses = {}
    for device in ("cpu", GPU):
        torch.manual_seed(0)
        model = peft.get_peft_model(qmoe.load(toy, dtype=torch.float32).to(device), config)
        ids = torch.randint(3, 200, (2, 16), generator=torch.Generator().manual_seed(1))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        losses[device] = []
        for _ in range(4):
            loss = model(ids.to(device), labels=ids.to(device)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[device].append(loss.item())
    assert losses[GPU][-1] < losses[GPU][0]
    assert losses[GPU] == pytest.approx(losses["cpu"], rel=1e-3)


def test_saved_from_the_gpu_is_what_was_loaded(toy, tmp_path):
    qmoe.load(toy, device_map=GPU).save_pretrained(tmp_path / "copy")
    qmoe.verify(tmp_path / "copy")
    a, b = (checkpoints.exported(p) for p in (toy, tmp_path / "copy"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_compressing_on_the_gpu(tmp_path, capsys):
    settings = qmoe.Settings(
        bits=1.0, calib=str(TEXT / "calib_mix.txt"), calib_tokens=8192, ctx=256, device=GPU
    )
    report = qmoe.compress(str(TOY), tmp_path / "out", settings)
    assert report.sizes.bits_per_weight == pytest.approx(1.0, rel=0.01)
    score = qmoe.evaluate(
        str(tmp_path / "out"), str(TEXT / "dev_en.txt"), reference=str(TOY), tokens=2048, ctx=256,
        device=GPU,
    )  # fmt: skip
    assert score.kl < 0.05
    print(json.dumps({"kl": score.kl}))


def test_the_gpu_holds_one_copy_of_the_experts(toy):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = qmoe.load(toy, dtype=torch.bfloat16, device_map=GPU)
    held = torch.cuda.memory_allocated() - before
    dense = sum(p.nbytes for p in model.parameters() if p.device.type == GPU)
    dense += sum(b.nbytes for b in model.buffers() if b.device.type == GPU)
    packs = sum(m.__dict__[cuda.PACK].nbytes() for m in model.modules() if cuda.PACK in m.__dict__)
    assert packs > 0
    assert held <= 1.02 * (dense + packs) + (1 << 20)
