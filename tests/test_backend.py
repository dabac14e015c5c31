"""A loaded model through the kernels gives what the compiled CPU path gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qmoe
from qmoe.inference import experts
from qmoe.inference.cuda import run_kernels

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ["mixtral", "gpt_oss", "deepseek_v3", "switch_transformers", "nllb-moe", "jetmoe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_twins_give_the_cpu_backends_logits(
    family, build_model, model_inputs, write_compressed, tmp_path, monkeypatch
):
    write_compressed(build_model(family), tmp_path / "m")
    model = qmoe.load(tmp_path / "m", dtype=torch.float32)
    inputs = model_inputs(model)
    with torch.no_grad():
        want = model(**inputs, use_cache=False).logits
        monkeypatch.setitem(experts.BACKENDS, "cpu", run_kernels)
        got = model(**inputs, use_cache=False).logits
        again = model(**inputs, use_cache=False).logits
    assert (want - got).abs().max() < 1e-4 * want.abs().max()
    assert torch.equal(got, again)


CODE = """
import sys, torch, qmoe
from qmoe.inference import experts
from qmoe.inference.cuda import run_kernels
from qmoe.measure.perplexity import score_batches
from transformers import AutoModelForCausalLM
ids = torch.randint(3, 120, (2, 16), generator=torch.Generator().manual_seed(0))
batch = [{"input_ids": ids, "labels": ids}]
plain = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32).eval()
model = qmoe.load(sys.argv[1], dtype=torch.float32)
experts.BACKENDS["cpu"] = run_kernels
score = score_batches(model, batch, plain)
print(score.perplexity, score.as_dict()["reference_perplexity"], score.kl)
"""


def test_perplexity_through_the_kernels_is_the_exported_models(compressed, tmp_path):
    from qmoe.publish.export import export

    out, _ = compressed
    export(out, tmp_path / "plain", dtype="float32")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(out), str(tmp_path / "plain")],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    through, plain, kl = map(float, done.stdout.split())
    assert abs(through / plain - 1) < 1e-4
    assert abs(kl) < 1e-5
