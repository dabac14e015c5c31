"""`qmoe import` on the command line: what it says and writes, and what it refuses."""

import json
import shutil
from argparse import Namespace

import torch
from click.testing import CliRunner

from qmoe.cli import main


def test_import_of_something_else(tmp_path, tiny):
    source = tiny.save("qwen3_moe", tmp_path / "source")
    for project in ("openmoe", "fairseq", "megablocks"):
        done = CliRunner().invoke(main, ["import", project, str(source), str(tmp_path / "out")])
        assert done.exit_code == 2, done.output
        assert done.stderr.startswith("qmoe: ")
        assert len(done.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_import_on_the_command_line(tmp_path, tiny):
    """A Megatron checkpoint, imported with --json; then its own output is refused as a target."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g) * 0.1

    layer = {
        "input_layernorm.weight": draw(32),
        "input_layernorm.bias": draw(32),
        "post_attention_layernorm.weight": draw(32),
        "post_attention_layernorm.bias": draw(32),
        "self_attention.query_key_value.weight": draw(96, 32),
        "self_attention.query_key_value.bias": draw(96),
        "self_attention.dense.weight": draw(32, 32),
        "self_attention.dense.bias": draw(32),
        "mlp.router.layer.weight": draw(4, 32),
        "mlp.experts.bias": draw(32),
        "mlp.experts.mlp.w1": draw(96, 32),
        "mlp.experts.mlp.w2": draw(96, 32),
    }
    encoder = {f"layers.0.{k}": v for k, v in layer.items()}
    encoder |= {"final_layernorm.weight": draw(32), "final_layernorm.bias": draw(32)}
    embedding = {
        "word_embeddings": {"weight": draw(50, 32)},
        "position_embeddings": {"weight": draw(40, 32)},
    }
    settings = {
        "num_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 24,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "moe_normalize_expert_weights": None,
    }
    model = {"language_model": {"embedding": embedding, "encoder": encoder}}
    rank = tmp_path / "src" / "iter_0000001" / "mp_rank_00"
    rank.mkdir(parents=True)
    torch.save({"args": Namespace(**settings), "model": model}, rank / "model_optim_rng.pt")
    (tmp_path / "src" / "latest_checkpointed_iteration.txt").write_text("1\n")
    line = ["import", "megablocks", str(tmp_path / "src"), str(tmp_path / "dst")]
    done = CliRunner().invoke(main, [*line, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tensors"]["used"] == len(layer) + 4
    assert found["parameters"] == sum(v.numel() for v in layer.values()) + 64 + 90 * 32
    again = CliRunner().invoke(main, line)
    assert again.exit_code == 2
    assert "already exists; choose another output directory or remove it" in again.stderr
    shutil.rmtree(tmp_path / "dst")
    plain = CliRunner().invoke(main, line)
    assert plain.exit_code == 0
    assert "next: qmoe compress" in plain.stdout
