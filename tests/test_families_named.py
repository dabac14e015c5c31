"""The named families in the layouts in which they are published, through the whole path: compress,
load, compare with the exported model, generate, save, load again; and every tensor accounted for.
"""

import json
import shutil
from math import prod

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, JetMoeForCausalLM

import qmoe
from qmoe.calib.batches import inputs_only, prepare, split_batches
from qmoe.calib.routing import Parked
from qmoe.compression.pipeline import compress
from qmoe.compression.settings import Settings
from qmoe.errors import CorruptError, OutputError
from qmoe.measure.perplexity import score_batches
from qmoe.measure.score import evaluate, load_any
from qmoe.models.families.find import repair
from qmoe.publish.export import export
from qmoe.publish.verify import verify
from qmoe.source.checkpoint import open_checkpoint
from qmoe.store.inspect import inspect
from qmoe.store.manifest import MANIFEST, read_sealed


def _add(directory, tensors):
    """Puts more tensors into a one-file checkpoint."""
    from safetensors.torch import save_file

    file = directory / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, {"format": "pt"})


def _more(directory, old, new, extra):
    """A multi-token-prediction layer: a copy of a layer under the next number, and projections."""
    layer = {k: v for k, v in load_file(directory / "model.safetensors").items() if old in k}
    g = torch.Generator().manual_seed(7)
    made = {n: torch.randn(*s, generator=g).bfloat16() for n, s in extra.items()}
    added = {k.replace(old, new): v.clone() for k, v in layer.items()} | made
    _add(directory, added)
    return added


def _mtp_deepseek(tiny, d):
    wide = {f"model.layers.3.{n}.weight": (64,) for n in ("enorm", "hnorm", "shared_head.norm")}
    wide |= {"model.layers.3.eh_proj.weight": (64, 128)}
    return _more(d, "model.layers.2.", "model.layers.3.", wide)


def _mtp_qwen(tiny, d):
    return _more(d, "model.layers.3.", "mtp.layers.0.", {"mtp.fc.weight": (64, 128)})


def _mtp_fp8(tiny, d):
    """As DeepSeek-V3 is published: fp8 blocks that the matrices are no multiples of, in the
    multi-token-prediction layer, too; and a scale of activations beside one of its matrices."""
    _mtp_deepseek(tiny, d)
    tiny.to_fp8(d, (32, 48))
    _add(d, {"model.layers.3.mlp.experts.0.up_proj.input_scale": torch.tensor(0.5)})
    return _of_layer_3(d)


def _mtp_int4(tiny, d):
    _mtp_deepseek(tiny, d)
    tiny.to_int4(d)
    return _of_layer_3(d)


def _of_layer_3(directory):
    stored = load_file(directory / "model.safetensors")
    found = {k: v for k, v in stored.items() if ".layers.3." in k}
    assert len({v.dtype for v in found.values()}) > 1  # words, scales and plain tensors
    return found


def _kimi(tiny, d):
    tiny.to_int4(d)
    return _kimi_name(tiny, d)


def _kimi_name(tiny, d):
    """Kimi-K2: its own model type and code, DeepSeek-V3's layers."""
    config = json.loads((d / "config.json").read_text())
    config["model_type"] = "kimi_k2"
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}
    (d / "config.json").write_text(json.dumps(config))
    return {}


ALL_SPARSE = {"num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 4}
BFLOAT16 = torch.bfloat16
# family, settings, dtype, what is done to the source (returns tensors that no module takes)
CASES = {
    "DeepSeek-V3 with MTP": ("deepseek_v3", {}, BFLOAT16, _mtp_deepseek),
    "GLM-4.5 with MTP": ("glm4_moe", {}, BFLOAT16, _mtp_deepseek),
    "Qwen3-Next with MTP": ("qwen3_next", {}, BFLOAT16, _mtp_qwen),
    "DeepSeek-V3 fp8 with MTP": ("deepseek_v3", {}, BFLOAT16, _mtp_fp8),
    "DeepSeek-V3 int4 with MTP": ("deepseek_v3", {}, BFLOAT16, _mtp_int4),
    "Kimi-K2": ("deepseek_v3", {"n_group": 1}, BFLOAT16, _kimi_name),
    "Kimi-K2 int4": ("deepseek_v3", {"n_group": 1}, BFLOAT16, _kimi),
    "gpt-oss MXFP4": ("gpt_oss", {}, BFLOAT16, lambda t, d: t.to_mxfp4(d) and {}),
    "Switch, every layer sparse": ("switch_transformers", ALL_SPARSE, torch.float32, None),
}


@pytest.mark.parametrize("case", CASES)
def test_published_layout(tmp_path, tiny, generic, case, table_row):
    family, changes, dtype, rewrite = CASES[case]
    model = tiny.make(family, dtype, **changes)
    source = tmp_path / "source"
    model.save_pretrained(source)
    carried = rewrite(tiny, source) if rewrite is not None else {}
    passed = generic.prove(source, tmp_path, tiny, type(model))
    kind = json.loads((source / "config.json").read_text())["model_type"]
    table_row("named", generic.row(case, kind, passed, tmp_path))
    counts = inspect(tmp_path / "q").tensors
    assert sum(counts.values()) == len(load_file(source / "model.safetensors"))
    assert counts["carried"] == len(carried)
    assert counts["left out"] == 0
    assert counts["coded"] > 0
    assert counts["kept"] > 0
    for folder in ("dense", "again"):
        stored = {k: v for f in (tmp_path / folder).glob("*.safetensors") for k, v in _any(f)}
        for name, tensor in carried.items():
            assert stored[name].dtype == tensor.dtype, (folder, name)
            assert torch.equal(_bytes(stored[name]), _bytes(tensor)), (folder, name)


def _any(file):
    return load_file(file).items()


def _bytes(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def test_rows_paired_by_number_are_seen(tmp_path, tiny, generic, monkeypatch):
    """JetMoE's experts get rows in the order of its router's decisions: a drift between the rows of
    one number shrank them, and only a comparison with the source itself sees it."""
    monkeypatch.setattr(Parked, "partners", lambda *_: None)
    source = tiny.save("jetmoe", tmp_path / "source")
    with pytest.raises(AssertionError, match=r"'kl': 0\.(0[1-9]|[1-9])"):
        generic.prove(source, tmp_path, tiny, JetMoeForCausalLM)


def test_an_export_keeps_what_its_carried_tensors_mean(tmp_path, tiny):
    """Quantized tensors without a module in a dense checkpoint: it is scored and compressed like
    any other, and they come along once more."""
    source = tmp_path / "source"
    tiny.make("deepseek_v3", BFLOAT16).save_pretrained(source)
    carried = _mtp_fp8(tiny, source)
    _compressed(source, tmp_path, tiny)
    export(tmp_path / "q", tmp_path / "dense")
    text = str(tmp_path / "text.txt")
    score = evaluate(
        *(str(tmp_path / "q"), text, str(tmp_path / "dense")),
        **{"ctx": 32, "tokens": 200, "dtype": "bfloat16", "device": "cpu"},
    )
    assert score.kl == pytest.approx(0, abs=1e-3)
    for folder in (source, tmp_path / "dense"):
        assert open_checkpoint(folder).settings["quant_method"] == "fp8"
    assert open_checkpoint(tmp_path / "dense").quantization is None
    before = inspect(tmp_path / "q")
    (tmp_path / "q").rename(tmp_path / "first")
    _compressed(tmp_path / "dense", tmp_path, tiny)
    after = inspect(tmp_path / "q")
    assert after.tensors["carried"] == before.tensors["carried"] == len(carried)
    weights = open_checkpoint(source)
    unused = [n for n in weights.names() if ".layers.3." in n]
    assert after.carried_weights == sum(prod(weights.shape(n)) for n in unused)


def test_rows_that_a_router_orders_at_a_high_rate(tmp_path, tiny, generic):
    """JetMoE by `rd` at about 8 bits is the source; its drift term once paired unlike tokens."""
    model = tiny.make("jetmoe")
    model.save_pretrained(tmp_path / "source")
    generic.prove(tmp_path / "source", tmp_path, tiny, type(model))


@pytest.mark.slow
def test_every_named_family(tmp_path, tiny, generic, family, table_row):
    model = tiny.make(family)
    model.save_pretrained(tmp_path / "source")
    passed = generic.prove(tmp_path / "source", tmp_path, tiny, type(model))
    table_row("named", generic.row(tiny.TITLES[family], family, passed, tmp_path))
    counts = inspect(tmp_path / "q").tensors
    assert counts["carried"] == 0
    assert sum(counts.values()) == len(load_file(tmp_path / "source" / "model.safetensors"))


def _compressed(source, tmp_path, tiny, **options):
    tiny.save_tokenizer(source)
    text = tiny.save_text(tmp_path / "text.txt", 400)
    settings = Settings(method="rtn", calib=str(text), calib_tokens=256, ctx=32, **options)
    return compress(str(source), tmp_path / "q", settings), text


def test_carried_tensors_are_verified_and_do_not_disturb(tmp_path, tiny):
    source = tiny.save("deepseek_v3", tmp_path / "source")
    added = _mtp_deepseek(tiny, source)
    report, _ = _compressed(source, tmp_path, tiny)
    out = tmp_path / "q"
    assert report.as_dict()["tensors"]["carried"] == len(added)
    found = inspect(out)
    assert found.carried_weights == sum(v.numel() for v in added.values())
    assert verify(out).tensors == len(read_sealed(out / MANIFEST)["tensors"])
    listed = json.loads((out / "qmoe.safetensors.index.json").read_text())["weight_map"]
    assert not listed.keys() & added.keys()
    files = read_sealed(out / MANIFEST)["blocks"]["carried tensors"]
    data = bytearray((out / files[0]).read_bytes())
    data[-5] ^= 1
    model = qmoe.load(out)
    (out / files[0]).write_bytes(data)
    with pytest.raises(CorruptError, match="is corrupt: sha256"):
        verify(out)
    (out / files[0]).unlink()
    with pytest.raises(CorruptError, match="cannot be read"):
        model.save_pretrained(tmp_path / "again")
    out.rename(tmp_path / "gone")
    with pytest.raises(OutputError, match="no module takes"):
        model.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("case", ["Kimi-K2 int4", "DeepSeek-V3 fp8 with MTP", "gpt-oss MXFP4"])
@torch.no_grad()
def test_eval_reads_the_published_layout(tmp_path, tiny, case):
    """As a model and as a reference; the values are those of the format's definition."""
    family, changes, _, rewrite = CASES[case]
    source = tmp_path / "source"
    tiny.make(family, BFLOAT16, **changes).save_pretrained(source)
    tiny.save_tokenizer(source)
    rewrite(tiny, source)
    loaded = load_any(str(source), "float32", torch.device("cpu"))
    checkpoint = open_checkpoint(source)
    plain = {n: checkpoint.read(n) for n in checkpoint.names()}
    config = json.loads((source / "config.json").read_text())
    shutil.copytree(source, tmp_path / "plain")
    tiny.rewrite(tmp_path / "plain", plain)
    for key in ("quantization_config", "auto_map"):
        config.pop(key, None)
    config["model_type"] = family  # what transformers calls it
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    expected = load_any(str(tmp_path / "plain"), "float32", torch.device("cpu"))
    ids = torch.randint(16, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loaded(ids).logits, expected(ids).logits, rtol=1e-6, atol=1e-6)
    text = tiny.save_text(tmp_path / "text.txt", 100)
    score = evaluate(str(source), str(text), str(tmp_path / "plain"), ctx=32, device="cpu")
    assert score.kl == pytest.approx(0, abs=1e-6)


@torch.no_grad()
def test_nllb_calibration_and_evaluation_use_the_equation(tmp_path, tiny):
    """Experts that transformers' own forward never calls get the tokens that the router sends
    them, and the score is that of the corrected model."""
    source = tiny.save("nllb-moe", tmp_path / "source")
    _, text = _compressed(source, tmp_path, tiny)
    model = tiny.make("nllb-moe")
    repair(model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    batch = prepare(tokenizer, model.config, str(text), 256, 32, 0)
    seen = []
    path = "model.encoder.layers.1.ffn"
    model.get_submodule(f"{path}.router").register_forward_hook(
        lambda m, args, out: seen.append((out[1] > 0).reshape(-1, 4))
    )
    for part in split_batches(batch):
        model(**inputs_only(part), use_cache=False)
    learned = ~torch.isin(
        batch["input_ids"].flatten(), torch.tensor(sorted(set(tokenizer.all_special_ids)))
    )
    tokens = read_sealed(tmp_path / "q" / MANIFEST)["report"]["modules"][f"{path}.experts"]
    assert tokens["tokens"] == torch.cat(seen)[learned].sum(0).tolist()
    assert min(tokens["tokens"]) > 0
    expected = score_batches(
        model, split_batches(prepare(tokenizer, model.config, str(text), 2**40, 32, 0))
    )
    got = evaluate(str(source), str(text), ctx=32, device="cpu")
    assert got.nll == pytest.approx(expected.nll, abs=1e-6)
    export(tmp_path / "q", tmp_path / "dense", "float32")
    dense = load_any(str(tmp_path / "dense"), "float32", torch.device("cpu"))
    ids = torch.randint(16, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    compressed = qmoe.load(tmp_path / "q", dtype=torch.float32)(**inputs).logits
    torch.testing.assert_close(compressed, dense(**inputs).logits, rtol=1e-4, atol=1e-4)
