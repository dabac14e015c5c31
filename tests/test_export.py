"""export, verify, inspect on compressed checkpoints of several families."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import qmoe
from qmoe.errors import CorruptError, OutputError
from qmoe.models.families import find as layouts
from qmoe.publish.export import export
from qmoe.publish.verify import verify
from qmoe.store.inspect import inspect
from qmoe.store.manifest import MANIFEST, read_sealed, write_sealed
from qmoe.store.reader import Container
from qmoe.store.writer import INDEX
from qmoe.system.spill import Spill


def _auto(model):
    return AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM


@torch.no_grad()
def _logits(model, inputs):
    return model(**inputs, use_cache=False).logits


def _names(directory):
    return set(json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"])


def test_export_in_float32_is_the_same_model_in_the_family_layout(
    family, build_model, model_inputs, write_compressed, tmp_path
):
    model = build_model(family)
    dense = write_compressed(model, tmp_path / "c")
    export(tmp_path / "c", tmp_path / "plain", dtype="float32")
    plain, info = _auto(dense).from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, p in dense.state_dict().items():
        assert torch.equal(plain.state_dict()[name], p), name
    layouts.repair(plain)
    inputs = model_inputs(dense)
    expected = _logits(qmoe.load(tmp_path / "c"), inputs)
    assert (_logits(plain, inputs) - expected).abs().max() <= 1e-4 * expected.abs().max()
    model.save_pretrained(tmp_path / "source", max_shard_size="1KB")
    assert _names(tmp_path / "plain") == _names(tmp_path / "source")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_export_rounds_once(compressed, dtype, tmp_path):
    out, dense = compressed
    export(out, tmp_path / "plain", dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    wanted = getattr(torch, dtype)
    for name, p in dense.state_dict().items():
        assert plain.state_dict()[name].dtype == wanted
        assert torch.equal(plain.state_dict()[name], p.to(wanted)), name
    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == dtype
    assert (tmp_path / "plain/tokenizer_config.json").exists()


def test_export_keeps_what_transformers_keeps_in_float32(build_model, write_compressed, tmp_path):
    write_compressed(build_model("deepseek_v3"), tmp_path / "c")
    export(tmp_path / "c", tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert plain.model.layers[1].mlp.experts.down_proj.dtype == torch.bfloat16


def test_export_refuses(compressed, tmp_path):
    out, _ = compressed
    (tmp_path / "there").mkdir()
    (tmp_path / "there/x").write_text("")
    with pytest.raises(OutputError, match="already exists"):
        export(out, tmp_path / "there")
    with pytest.raises(OutputError, match="choose one of"):
        export(out, tmp_path / "new", dtype="int8")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        export(out, tmp_path / "file" / "new")
    shutil.copytree(out, tmp_path / "bad")
    (tmp_path / "bad/config.json").write_text("{}")
    with pytest.raises(CorruptError):
        export(tmp_path / "bad", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "new.partial").exists()


def test_verify_counts(compressed):
    out, dense = compressed
    seen = []
    found = verify(out, progress=seen.append)
    assert found.matrices == dense.config.num_hidden_layers * 4 * 2
    assert found.files == len(list(out.iterdir())) - 1
    assert found.tensors == len(Container.open(out).tensors)
    assert found.stored_bytes == sum(p.stat().st_size for p in out.iterdir() if p.name != MANIFEST)
    assert found.stored_bytes < sum(seen) < 2 * found.stored_bytes


def _rewrite_stream(out, change):
    """Puts another stream in place of one, with checksums that fit."""
    container = Container.open(out)
    name = "model.layers.0.mlp.experts.stream"
    file = container.tensors[name][0]
    tensors = {n: container.read(n) for n, (f, _, _) in container.tensors.items() if f == file}
    change(tensors[name])
    spill = Spill(out / "spill")
    for n, t in tensors.items():
        spill.add(n, t)
    size, digest, sums = spill.write_shard(out / file, spill.shards(1 << 40)[0])
    spill.close()
    manifest = read_sealed(out / MANIFEST)
    manifest["files"][file] = {"bytes": size, "sha256": digest}
    manifest["tensors"] |= {n: {"file": file, "sha256": s} for n, s in sums.items()}
    write_sealed(out / MANIFEST, manifest)


def test_verify_decodes_every_stream(compressed, tmp_path):
    """Damage that all checksums of the container agree with is found by the codec."""
    out = tmp_path / "c"
    shutil.copytree(compressed[0], out)
    _rewrite_stream(out, lambda stream: None)
    verify(out)
    _rewrite_stream(out, lambda stream: stream[-40:].bitwise_xor_(17))
    with pytest.raises(CorruptError, match=r"model\.layers\.0\.mlp\.experts expert 3 down"):
        verify(out)
    with pytest.raises(CorruptError, match="expert 3 down"), torch.no_grad():
        qmoe.load(out)(torch.arange(3, 60)[None])


def test_verify_compares_tensors_with_the_manifest(compressed, tmp_path):
    out = tmp_path / "c"
    shutil.copytree(compressed[0], out)
    manifest = read_sealed(out / MANIFEST)
    manifest["tensors"]["model.norm.weight"]["sha256"] = "0" * 64
    write_sealed(out / MANIFEST, manifest)
    with pytest.raises(CorruptError, match=r"tensor model\.norm\.weight has sha256"):
        verify(out)


def test_inspect_counts_what_is_on_disk(compressed):
    out, dense = compressed
    found = inspect(out)
    blocks = dense.config.num_hidden_layers
    weights = blocks * 4 * (192 * 64 + 64 * 96)
    container = Container.open(out)
    streams = sum(e.end - e.begin for n, (_, _, e) in container.tensors.items() if "experts" in n)
    assert found.expert_weights == weights
    assert 8 * streams / weights < found.bits_per_weight < 8 * (streams + 400 * blocks) / weights
    assert 0 < found.ideal_bits_per_weight < found.bits_per_weight
    assert found.stored_bytes == sum(p.stat().st_size for p in out.iterdir())
    assert found.source_bytes == 1000
    shards = [*out.glob("*.safetensors"), out / INDEX]
    total = sum(p.numel() for p in dense.parameters())
    bits = 8 * sum(p.stat().st_size for p in shards) / total
    assert found.model_bits_per_weight == pytest.approx(bits)
    zeros = sum(
        int((layouts.read_expert(m, e)[p.name] == 0).sum())
        for layout, m in layouts.find_experts(dense)
        for e in range(4)
        for p in layout.projections
    )
    assert found.zeros == pytest.approx(zeros / weights)
    assert (found.experts, found.experts_without_tokens) == (4 * blocks, blocks)
    row = found.layers[1]
    assert (row.module, row.projection) == ("model.layers.0.mlp.experts", "down")
    assert (row.tokens, row.without_tokens, row.notes) == ((0, 6, 9), 1, 1)
    json.dumps(found.as_dict(layers=True))


def test_inspect_decodes_nothing(compressed, tmp_path):
    """Streams full of zeros do not disturb it; a broken manifest does."""
    out = tmp_path / "c"
    shutil.copytree(compressed[0], out)
    _rewrite_stream(out, torch.Tensor.zero_)
    before = inspect(compressed[0]).bits_per_weight
    assert inspect(out).bits_per_weight == before
    (out / MANIFEST).write_bytes((out / MANIFEST).read_bytes().replace(b"random", b"Random"))
    with pytest.raises(CorruptError):
        inspect(out)
