"""Imported checkpoints against the layer equations, which tests/equations.py writes out."""

import json

import pytest
import torch
from equations import (
    V,
    fairseq_equations,
    fairseq_source,
    megablocks_equations,
    megablocks_source,
    openmoe_equations,
    openmoe_source,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qmoe.errors import OutputError, SourceError
from qmoe.models.importers import IMPORTERS, writing

CASES = {
    "openmoe": ("openmoe", openmoe_source, openmoe_equations, {}),
    "fairseq": ("fairseq", fairseq_source, fairseq_equations, {}),
    "fairseq top-1": ("fairseq", fairseq_source, fairseq_equations, {"moe_top1_expert": True}),
    "megablocks": ("megablocks", megablocks_source, megablocks_equations, {}),
    "megablocks gated, ranks": (
        "megablocks",
        megablocks_source,
        megablocks_equations,
        {"gated": True, "ranks": 2, "moe_normalize_expert_weights": 2.0, "dense": (1,)},
    ),
    "megablocks top-1": ("megablocks", megablocks_source, megablocks_equations, {"moe_top_k": 1}),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_import_follows_the_equations(tmp_path, case):
    kind, write, equations, options = CASES[case]
    source = write(tmp_path / "src", **options)
    done = IMPORTERS[kind](tmp_path / "src", tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(done.directory, output_loading_info=True)
    assert not any(info.values()), info
    assert done.parameters == sum(p.numel() for p in model.parameters())
    ids = torch.tensor([3, 17, 9, 9, 41, 5, 30, 22])
    expected = equations(source, ids)
    for implementation in ("eager", "grouped_mm"):
        model.set_experts_implementation(implementation)
        got = model.eval()(ids[None]).logits[0]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    new = model.generate(ids[None], max_new_tokens=3, do_sample=False, pad_token_id=0)[0]
    assert int(new[8]) == int(expected[-1].argmax())  # generation goes through the cache
    assert int(new[9]) == int(equations(source, new[:9])[-1].argmax())
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(again(ids[None]).logits[0], expected, rtol=1e-4, atol=1e-4)
    saved = model.state_dict()
    assert all(torch.equal(v, saved[k]) for k, v in again.state_dict().items())


def test_files_beside_the_weights(tmp_path):
    openmoe_source(tmp_path / "src")
    done = IMPORTERS["openmoe"](tmp_path / "src", tmp_path / "out")
    names = {p.name for p in done.directory.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer_config.json"}
    assert sorted(load_file(tmp_path / "src" / "model.safetensors")) == sorted(done.used)
    assert not (tmp_path / "out.partial").exists()


def test_bounded_shards(tmp_path, monkeypatch):
    _, ranks, _ = fairseq_source(tmp_path / "src")
    monkeypatch.setattr(writing, "SHARD_BYTES", 30_000)
    done = IMPORTERS["fairseq"](tmp_path / "src", tmp_path / "out")
    files = sorted(done.directory.glob("model-*.safetensors"))
    assert len(files) > 3
    assert max(f.stat().st_size for f in files) < 40_000
    assert done.ignored == ("decoder.version",)
    stack = [r["decoder.layers.1.moe_layer.experts.1.fc2.weight"] for r in ranks]
    tensors = {k: v for f in files for k, v in load_file(f).items()}
    assert torch.equal(tensors["model.layers.1.moe.experts.down_proj"][1::2], torch.stack(stack))


def _replace(path, change):
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


def test_fairseq_bad_sources(tmp_path):
    run = IMPORTERS["fairseq"]
    with pytest.raises(SourceError, match=r"0 files \*-shared.pt"):
        run(tmp_path, tmp_path / "out")
    d = tmp_path / "src"
    for options, words in (
        ({"decoder_learned_pos": True}, "decoder_learned_pos=True is not supported"),
        ({"activation_fn": "swish"}, "activation 'swish'"),
    ):
        fairseq_source(d, **options)
        with pytest.raises(SourceError, match=words):
            run(d, tmp_path / "out")
    fairseq_source(d)
    _replace(d / "model-shared.pt", lambda s: s["model"].update({"decoder.x": torch.ones(1)}))
    with pytest.raises(SourceError, match=r"'decoder.x' has no place"):
        run(d, tmp_path / "out")
    fairseq_source(d)
    name = "decoder.layers.3.moe_layer.experts.1.fc1.weight"
    _replace(d / "model-rank-1.pt", lambda s: s["model"].pop(name))
    with pytest.raises(SourceError, match=f"rank 1: '{name}' is missing"):
        run(d, tmp_path / "out")
    (d / "model-rank-1.pt").rename(d / "model-rank-2.pt")
    with pytest.raises(SourceError, match=r"model-rank-1.pt is missing"):
        run(d, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_openmoe_bad_sources(tmp_path):
    run, d = IMPORTERS["openmoe"], tmp_path / "src"
    t = openmoe_source(d)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists"):
        run(d, tmp_path / "out")
    save_file({**t, "model.layers.0.odd": torch.ones(2)}, d / "model.safetensors")
    with pytest.raises(SourceError, match=r"model.layers.0.odd' has no place"):
        run(d, tmp_path / "new")
    t.pop("model.norm.weight")
    save_file(t, d / "model.safetensors")
    with pytest.raises(SourceError, match=r"nothing for model.norm.weight \[32\]"):
        run(d, tmp_path / "new")
    openmoe_source(d, hidden_act="gelu")
    with pytest.raises(SourceError, match="hidden_act='gelu'"):
        run(d, tmp_path / "new")
    openmoe_source(d, num_experts=6)
    with pytest.raises(SourceError, match=r"\[4, .*the model needs \[6, "):
        run(d, tmp_path / "new")
    (d / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SourceError, match="no OpenMoE checkpoint"):
        run(d, tmp_path / "new")


def test_megablocks_bad_sources(tmp_path):
    run = IMPORTERS["megablocks"]
    for i, (options, words) in enumerate(
        (
            ({"position_embedding_type": "rope"}, "position_embedding_type='rope'"),
            ({"moe_num_experts": None}, "no setting 'moe_num_experts'"),
            ({"moe_num_experts": 8}, "hold 4 of 8 experts"),
            ({"ffn_hidden_size": 20}, r"expected \[experts \* 20, 32\]"),
        )
    ):
        megablocks_source(tmp_path / f"src{i}", **options)
        with pytest.raises(SourceError, match=words):
            run(tmp_path / f"src{i}", tmp_path / "out")
    megablocks_source(tmp_path / "src")
    rank = tmp_path / "src" / "iter_0000070" / "mp_rank_00"
    rank.rename(rank.with_name("mp_rank_01"))
    with pytest.raises(SourceError, match="split by tensor or pipeline parallelism"):
        run(tmp_path / "src", tmp_path / "out")
    with pytest.raises(SourceError, match=r"holds no mp_rank_"):
        run(tmp_path, tmp_path / "out")


def test_fairseq_tokenizer(tmp_path):
    d = tmp_path / "src"
    fairseq_source(d)
    vocabulary = {"a": 0, "b": 1, "\u0120": 2, "ab": 3, "\u0120ab": 4, "c": 5}  # \u0120 is a space
    (d / "encoder.json").write_text(json.dumps(vocabulary))
    (d / "vocab.bpe").write_text("#version: 0.2\na b\n\u0120 ab\n", encoding="utf-8")
    keys = ["4", "0", "1", "2", "3", "madeupword0000"]
    (d / "dict.txt").write_text("".join(f"{k} 7\n" for k in keys))
    done = IMPORTERS["fairseq"](d, tmp_path / "out")
    assert not any("tokenizer" in n for n in done.notes)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("ab ab\nba c", add_special_tokens=False).input_ids
    assert ids == [8, 4, 2, 6, 5, 7, 3]
    assert tokenizer.decode(ids[:2]) == "ab ab"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 1, 0)
    (d / "dict.txt").write_text("17 7\n")
    with pytest.raises(SourceError, match="GPT-2 has no token 17"):
        IMPORTERS["fairseq"](d, tmp_path / "new")
    (d / "dict.txt").write_text("".join(f"x{i} 7\n" for i in range(V)))
    with pytest.raises(SourceError, match=f"has {V} tokens, but the model's embedding only {V}"):
        IMPORTERS["fairseq"](d, tmp_path / "new")


NAMES = {"openmoe": "OpenMoE", "fairseq": "fairseq moe_lm", "megablocks": "Megatron, MegaBlocks"}


@pytest.mark.parametrize("kind", NAMES)
def test_imported_then_compressed(tmp_path, tiny, generic, kind, table_row):
    _, write, _, _ = CASES[kind]
    write(tmp_path / "src")
    source = IMPORTERS[kind](tmp_path / "src", tmp_path / "source").directory
    passed = generic.prove(source, tmp_path, tiny, AutoModelForCausalLM)
    config = json.loads((source / "config.json").read_text())
    row = generic.row(f"{NAMES[kind]}, imported", config["model_type"], passed, tmp_path)
    table_row("named", row)
