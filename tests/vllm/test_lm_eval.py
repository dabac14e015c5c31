"""lm-eval, which knows nothing of qmoe, through `qmoe exec`: a multiple-choice and a rolling task,
offline, with the figures that the model's own log probabilities give."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

import qmoe

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.vllm

CHOICES = """task: tiny_choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
ROLLING = """task: tiny_rolling
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""
QUESTIONS = [
    {"question": f"w{i} w{i + 1} w{i + 2}", "choices": ["w9", "w20 w21", "w33"], "answer": i % 3}
    for i in range(8)
]
TEXTS = ["w1 w2 w3 w4 w5 w6 w7 w8", "w30 w29 w28 w27", "w5 w5 w9 w9 w5"]


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("lm_eval")
    source = tiny.save("mixtral", folder / "source")
    tiny.save_tokenizer(source)
    text = str(tiny.save_text(folder / "text.txt", 400))
    settings = qmoe.Settings(method="rtn", calib=text, calib_tokens=256, ctx=32)
    qmoe.compress(str(source), folder / "q", settings)
    return folder / "q"


def _log_probability(model, context, continuation):
    """Sum of log p(continuation | context)."""
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        logs = torch.log_softmax(model(ids).logits[0].float(), -1)
    rows = logs[len(context) - 1 : -1]
    return float(rows.gather(1, torch.tensor(continuation)[:, None]).sum())


def _expected(out):
    model, tokenizer = qmoe.load(out, dtype=torch.float32), AutoTokenizer.from_pretrained(out)

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    right = 0
    for doc in QUESTIONS:
        scores = [_log_probability(model, ids(doc["question"]), ids(c)) for c in doc["choices"]]
        right += max(range(3), key=scores.__getitem__) == doc["answer"]
    # the first token of a rolling text is predicted from the end-of-text token
    logs = [_log_probability(model, [tokenizer.eos_token_id], ids(t)) for t in TEXTS]
    bits = -sum(logs) / math.log(2) / sum(len(t.encode()) for t in TEXTS)
    return right / len(QUESTIONS), bits


def test_multiple_choice_and_rolling(model, tmp_path):
    for name, rows, task in (
        ("choices", QUESTIONS, CHOICES),
        ("rolling", [{"text": t} for t in TEXTS], ROLLING),
    ):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}.yaml").write_text(task.format(file=file))
    command = [sys.executable, "-m", "qmoe", "exec", "--", "lm_eval", "run", "--model", "hf"]
    command += ["--model_args", f"pretrained={model},dtype=float32", "--device", "cpu"]
    command += ["--tasks", "tiny_choices,tiny_rolling", "--include_path", str(tmp_path)]
    command += ["--output_path", str(tmp_path / "results"), "--batch_size", "2"]
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    [file] = (tmp_path / "results").rglob("results*.json")
    results = json.loads(file.read_text())["results"]
    accuracy, bits = _expected(model)
    assert results["tiny_choices"]["acc,none"] == pytest.approx(accuracy)
    assert results["tiny_rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
