"""Tied parameters as the files hold them, in compress, load, export and save."""

import pytest
import torch
from checkpoints import compressed, edit, exported, logits_of, source_of
from safetensors.torch import load_file

import qmoe
from qmoe.errors import SourceError
from qmoe.models.streamed import StreamedModel
from qmoe.publish.export import export
from qmoe.publish.verify import verify
from qmoe.source.checkpoint import open_checkpoint

TIED = [
    ("qwen3_moe", "lm_head.weight", "model.embed_tokens.weight"),
    ("jetmoe", "lm_head.weight", "model.embed_tokens.weight"),
    ("switch_transformers", "encoder.embed_tokens.weight", "shared.weight"),
    ("switch_transformers", "lm_head.weight", "shared.weight"),
    ("nllb-moe", "model.decoder.embed_tokens.weight", "model.shared.weight"),
]


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize(("family", "copy", "original"), TIED)
def test_tied_parameters_with_values_of_their_own_stay_apart(
    tmp_path, tiny, family, copy, original, ending
):
    source = tmp_path / "source"
    cls = source_of(tiny, source, family, tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    tensors[copy] = tensors[original].flip(0).contiguous()
    tiny.rewrite(source, tensors)
    if ending == "bin":
        tiny.to_shards(source, 2, "bin")
    theirs = cls.from_pretrained(source, dtype=torch.float32).eval()
    assert torch.equal(theirs.get_parameter(copy), tensors[copy])
    streamed = StreamedModel(open_checkpoint(source)).whole()
    assert torch.equal(streamed.get_parameter(copy), tensors[copy])
    compressed(tiny, source, tmp_path / "q")
    verify(tmp_path / "q")
    loaded = qmoe.load(tmp_path / "q", dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "again")
    again = qmoe.load(tmp_path / "again", dtype=torch.float32)
    export(tmp_path / "q", tmp_path / "dense", "float32")
    dense = cls.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    for model in (loaded, again, dense):
        assert torch.equal(model.get_parameter(copy), tensors[copy])
        assert torch.equal(model.get_parameter(original), tensors[original])


@pytest.mark.parametrize(("family", "copy", "original"), TIED)
def test_a_stored_copy_stands_for_the_original(tmp_path, tiny, family, copy, original):
    source = tmp_path / "source"
    cls = source_of(tiny, source, family, tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    values = tensors.pop(original)
    tiny.rewrite(source, {**tensors, copy: values})
    expected = logits_of(cls.from_pretrained(source, dtype=torch.float32).eval())
    streamed = StreamedModel(open_checkpoint(source)).whole()
    if family != "nllb-moe":  # whose experts run as transformers has them only before a repair
        torch.testing.assert_close(logits_of(streamed), expected, rtol=1e-5, atol=1e-5)
    compressed(tiny, source, tmp_path / "q")
    loaded = qmoe.load(tmp_path / "q", dtype=torch.float32)
    assert torch.equal(loaded.get_parameter(original), values)
    assert torch.equal(loaded.get_parameter(copy), values)


def test_equal_copies_are_stored_once_and_none_is_an_error(tmp_path, tiny):
    source = tmp_path / "source"
    source_of(tiny, source, "qwen3_moe", tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    table = "model.embed_tokens.weight"
    tiny.rewrite(source, {**tensors, "lm_head.weight": tensors[table]})
    compressed(tiny, source, tmp_path / "q")
    export(tmp_path / "q", tmp_path / "dense", "float32")
    assert "lm_head.weight" not in exported(tmp_path / "dense")
    del tensors[table]
    tiny.rewrite(source, tensors)
    with pytest.raises(SourceError, match="no tensor on disk for"):
        StreamedModel(open_checkpoint(source))


def test_a_head_apart_with_dense_bits(tmp_path, tiny):
    source = tmp_path / "source"
    source_of(tiny, source, "qwen3_moe", tie_word_embeddings=False)
    edit(source, tie_word_embeddings=True)
    head = load_file(source / "model.safetensors")["lm_head.weight"]
    compressed(tiny, source, tmp_path / "q", dense_bits=8)
    loaded = qmoe.load(tmp_path / "q", dtype=torch.float32)
    assert (loaded.lm_head.weight - head).abs().max() < 0.1 * head.abs().max()
