"""The main paths from the command line on, on one tiny model.

`scripts/test --oldest` runs them with the oldest versions that pyproject.toml allows.
"""

import json

import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import qmoe
from qmoe.cli import main


def run(*words: object) -> str:
    done = CliRunner().invoke(main, [str(w) for w in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def answer(*words: object) -> dict:
    """The JSON that a command ends with; progress stands before it."""
    text = run(*words, "--json")
    return json.loads(text[text.index("\n{") + 1 if "\n{" in text else text.index("{") :])


@torch.no_grad()
def test_from_a_source_to_text_and_back(tmp_path, tiny):
    source = tiny.save("qwen3_moe", tmp_path / "source", torch.bfloat16)
    tiny.save_tokenizer(source)
    text = tiny.save_text(tmp_path / "text.txt", 3000)
    out, dense = tmp_path / "out", tmp_path / "dense"
    calib = ("--calib", text, "--calib-tokens", 2048, "--ctx", 128)
    run("compress", source, out, "--bits", 3, *calib)
    run("verify", out)
    assert "experts" in run("inspect", out)
    against = ("--reference", source, "--text", text, "--ctx", 128, "--tokens", 1024)
    score = answer("eval", out, *against)
    assert 0 < score["kl"] < 1
    assert score["perplexity"] > 1

    model = qmoe.load(out, dtype=torch.float32)
    ids = torch.randint(16, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    logits = model(ids).logits
    through = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(through(ids).logits, logits)
    words = model.generate(ids[:1], max_new_tokens=4, do_sample=False)
    assert words.shape == (1, 16)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(qmoe.load(tmp_path / "again", dtype=torch.float32)(ids).logits, logits)

    run("export", out, dense, "--dtype", "float32")
    plain = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    torch.testing.assert_close(plain(ids).logits, logits, rtol=1e-4, atol=1e-4)
