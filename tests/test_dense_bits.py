"""--dense-bits: attention, shared experts, embeddings and head, from the source to a loaded model
and back.
"""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import qmoe
from qmoe.codec.decoder import threads as decoder_threads
from qmoe.compression.coding import encode_planes
from qmoe.compression.dense import find_step
from qmoe.compression.pipeline import compress
from qmoe.compression.settings import Settings
from qmoe.errors import CorruptError, OutputError
from qmoe.inference.linear import IntegerLinear
from qmoe.publish.export import export
from qmoe.publish.verify import verify
from qmoe.quantize.dense import DenseSolver
from qmoe.store.block import BlockWriter
from qmoe.store.inspect import inspect
from qmoe.store.manifest import MANIFEST, read_manifest, read_sealed, write_sealed
from qmoe.store.reader import Container
from qmoe.store.stored_dense import DenseGeometry, StoredMatrix, parse_dense
from qmoe.system.files import canonical_json, file_sha256

# shapes large enough that side data does not eat the rate
SIZES = {
    "mixtral": {"hidden_size": 128, "num_hidden_layers": 2},
    "switch_transformers": {"d_model": 128, "d_kv": 32, "num_layers": 2, "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "deepseek_v3": {"hidden_size": 128, "num_hidden_layers": 2, "moe_intermediate_size": 64},
}  # fmt: skip
CODED = {  # some of what must be coded, and what must not
    "mixtral": (
        {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.o_proj.weight"},
        {"model.layers.1.mlp.gate.weight", "model.norm.weight"},
    ),
    "switch_transformers": (
        {
            "shared.weight",
            "encoder.block.0.layer.1.mlp.wi.weight",
            "decoder.block.1.layer.1.EncDecAttention.k.weight",
        },
        {
            "encoder.block.1.layer.1.mlp.router.classifier.weight",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        },
    ),
    "deepseek_v3": (
        {
            "lm_head.weight",
            "model.layers.0.mlp.down_proj.weight",
            "model.layers.1.mlp.shared_experts.down_proj.weight",
            "model.layers.1.self_attn.kv_b_proj.weight",
        },
        {"model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.e_score_correction_bias"},
    ),
}


def _run(tiny, source, text, out, bits):
    text_alone = {"calib": str(text), "calib_tokens": 1024, "ctx": 128, "unseen": 0.0}
    settings = Settings(method="rd", delta=2.0, dense_bits=bits, **text_alone)
    return compress(str(source), out, settings)


@pytest.fixture(scope="module")
def work(tmp_path_factory, tiny):
    """``work(family, bits=4)`` -> (source, compressed); made once."""
    made = {}
    root = tmp_path_factory.mktemp("dense")
    text = tiny.save_text(root / "text.txt", 1500)

    def get(family, bits=4):
        source = root / family
        if not source.exists():
            tiny.save(family, source, **SIZES[family])
            tiny.save_tokenizer(source)
        if (family, bits) not in made:
            made[family, bits] = root / f"{family}-{bits}"
            _run(tiny, source, text, made[family, bits], bits)
        return source, made[family, bits]

    return get


def _auto(config):
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _inputs(config):
    ids = torch.randint(16, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    more = {"decoder_input_ids": ids[:, :5]} if config.is_encoder_decoder else {}
    return {"input_ids": ids, **more}


def _weights(path):
    return {f.name: f.read_bytes() for f in sorted(path.glob("*.safetensors*"))}


@pytest.mark.parametrize("family", SIZES)
@torch.no_grad()
def test_from_source_to_loaded_saved_and_exported(family, work, tmp_path):
    source, out = work(family)
    container = Container.open(out)
    coded, plain = CODED[family]
    assert coded <= container.dense.keys()
    assert plain <= container.tensors.keys()
    assert not [n for n in container.dense if ".experts." in n]
    decoded = {n: container.dense_matrix(n).decode() for n in container.dense}

    model, info = _auto(qmoe.load(out).config).from_pretrained(out, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = qmoe.load(out, integers=False).state_dict()
    original = _auto(model.config).from_pretrained(source).state_dict()
    for name, weight in decoded.items():
        assert torch.equal(state[name], weight), name
        error = (weight - original[name]).norm() / original[name].norm()
        assert 0.01 < error < 0.35, (name, error)
    kept = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, IntegerLinear)}
    assert kept.keys() <= decoded.keys()
    assert (len(kept) > 0) == (not torch.cuda.is_available())
    for name, module in kept.items():
        assert torch.equal(module.integers().dense(torch.float32), decoded[name])

    model.save_pretrained(tmp_path / "again")
    assert _weights(tmp_path / "again") == _weights(out)
    inputs = _inputs(model.config)
    expected = model(**inputs).logits
    export(out, tmp_path / "plain", "float32")
    dense = _auto(model.config).from_pretrained(tmp_path / "plain").eval()
    torch.testing.assert_close(dense(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert verify(tmp_path / "again").matrices > len(decoded)


def test_tied_embeddings_are_stored_once_and_stay_tied(work):
    _, out = work("switch_transformers")
    model = qmoe.load(out)
    assert model.lm_head.weight is model.shared.weight
    assert "lm_head.weight" not in Container.open(out).dense
    assert "head" not in read_manifest(out)["blocks"]


@pytest.mark.parametrize("bits", [8, 3])
def test_stored_bits_are_those_asked_for(bits, work):
    source, out = work("mixtral", bits)
    found = inspect(out)
    assert found.coded_dense_bits_per_weight == pytest.approx(bits, rel=0.03)
    sizes = found.expert_bytes + found.coded_dense_weights * bits / 8
    assert found.model_bits_per_weight > 8 * sizes / (found.expert_weights + found.dense_weights)
    report = read_manifest(out)["report"]["dense"]
    assert sum(r["weights"] for r in report.values()) == found.coded_dense_weights
    original = AutoModelForCausalLM.from_pretrained(source).state_dict()
    container = Container.open(out)
    for name in container.dense:
        error = (container.dense_matrix(name).decode() - original[name]).norm()
        assert error / original[name].norm() < {8: 0.03, 3: 0.6}[bits], name


def test_untouched_by_default_and_repeatable(work, tiny, tmp_path):
    source, out = work("mixtral")
    text = out.parent / "text.txt"
    _run(tiny, source, text, tmp_path / "again", 4)
    assert _weights(tmp_path / "again") == _weights(out)
    _run(tiny, source, text, tmp_path / "plain", 16)
    assert Container.open(tmp_path / "plain").dense == {}
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "dense" not in config["quantization_config"]


def test_experts_are_fitted_to_the_decoded_attention(work, tiny, tmp_path):
    """With other dense weights before them, the experts get other integers."""
    source, out = work("mixtral", 3)
    _run(tiny, source, out.parent / "text.txt", tmp_path / "plain", 16)
    name = "model.layers.0.mlp.experts"
    a, b = (Container.open(p).experts(name).stream for p in (out, tmp_path / "plain"))
    assert a.shape != b.shape or not torch.equal(a, b)


@torch.no_grad()
def test_disk_offload_and_other_dtypes(work, tmp_path):
    _, out = work("mixtral")
    model = qmoe.load(out)
    inputs = _inputs(model.config)
    expected = model(**inputs).logits
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "disk"}
    places |= {"model.rotary_emb": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    away = qmoe.load(out, device_map=places, offload_folder=str(tmp_path / "off"))
    assert away.model.layers[0].self_attn.q_proj.weight.is_meta
    torch.testing.assert_close(away(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    away.save_pretrained(tmp_path / "saved")
    assert _weights(tmp_path / "saved") == _weights(out)
    half, whole = (qmoe.load(out, integers=False, dtype=d) for d in (torch.bfloat16, torch.float32))
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(half.lm_head.weight, whole.lm_head.weight.bfloat16())


def test_integers_are_small_repeatable_and_pass_gradients(work, threads):
    _, out = work("mixtral")
    head = qmoe.load(out, dtype=torch.bfloat16).lm_head
    if torch.cuda.is_available():
        pytest.skip("integers stay on machines without a GPU")
    assert head.weight.dtype == torch.int8
    dense = qmoe.load(out, integers=False).lm_head.weight.detach()
    x = torch.randn(40, dense.shape[1], generator=torch.Generator().manual_seed(2))
    alone = torch.cat([head(row) for row in x.split(1)])
    torch.testing.assert_close(alone, x @ dense.T, rtol=1e-5, atol=1e-5)
    for count in (1, 2):
        threads(count)
        for n in (1, 2, 4, 5, 16):  # no row depends on its neighbours
            assert torch.equal(head(x[None, :n])[0], alone[:n])
    torch.testing.assert_close(head(x), alone, rtol=1e-5, atol=1e-5)
    assert head(x.bfloat16()).dtype == torch.bfloat16
    assert head(x[:0]).shape == (0, len(dense))
    compiled, found = torch.compile(head, backend="aot_eager", fullgraph=True), []
    for call in (head, compiled):
        y = x[:3].clone().requires_grad_()
        call(y).square().sum().backward()
        found.append(y.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.fixture
def threads(monkeypatch):
    monkeypatch.setattr(decoder_threads, "_SMALL", 0)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@torch.no_grad()
def test_saving_a_changed_weight_or_without_the_source(work, tmp_path):
    _, out = work("mixtral")
    shutil.copytree(out, tmp_path / "src")
    whole = qmoe.load(tmp_path / "src")
    if isinstance(whole.lm_head, IntegerLinear):
        whole.lm_head.weight[3, 4] += 1
        with pytest.raises(OutputError, match=r"lm_head\.weight were changed"):
            whole.save_pretrained(tmp_path / "no")
    model = qmoe.load(tmp_path / "src", integers=False)
    model.lm_head.weight[3, 4] += 1.0
    model.save_pretrained(tmp_path / "changed")
    assert "lm_head.weight" not in Container.open(tmp_path / "changed").dense
    again = qmoe.load(tmp_path / "changed")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    again.save_pretrained(tmp_path / "changed again")
    assert _weights(tmp_path / "changed") == _weights(tmp_path / "changed again")
    shutil.rmtree(tmp_path / "src")
    with pytest.raises(OutputError, match="not there"):
        model.save_pretrained(tmp_path / "x")


def _reseal(out, name):
    """Makes the manifest agree with a changed file, as an attacker would."""
    manifest = read_sealed(out / MANIFEST)
    path = out / name
    manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    write_sealed(out / MANIFEST, {k: v for k, v in manifest.items() if k != "checksum"})


def test_every_bit_flip_is_found(work, tmp_path):
    _, out = work("mixtral")
    shutil.copytree(out, tmp_path / "c")
    file = tmp_path / "c" / "qmoe-head.safetensors"
    data = file.read_bytes()
    for at in range(9, len(data), len(data) // 40):
        file.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(CorruptError, match="sha256"):
            verify(tmp_path / "c")


def test_streams_that_do_not_decode_are_found_by_verify_and_load(work, tmp_path):
    _, out = work("mixtral")
    shutil.copytree(out, tmp_path / "c")
    container = Container.open(out)
    file, start, entry = container.tensors["lm_head.weight.dense_stream"]
    path = tmp_path / "c" / file
    data = bytearray(path.read_bytes())
    data[start + (entry.begin + entry.end) // 2] ^= 1
    path.write_bytes(data)
    _reseal(tmp_path / "c", file)
    with pytest.raises(CorruptError, match=r"lm_head\.weight"):
        verify(tmp_path / "c")
    with pytest.raises(CorruptError, match=r"lm_head\.weight band 0 plane 0"):
        qmoe.load(tmp_path / "c")


BAD = {
    "no such parameter": lambda d: d.update(x=d.pop("lm_head.weight")),
    "not listed": lambda d: d.pop("lm_head.weight"),
    "other rows": lambda d: d["lm_head.weight"].update(rows=127),
    "other cols": lambda d: d["lm_head.weight"].update(cols=64),
    "more bands": lambda d: d["lm_head.weight"].update(band=7),
    "more planes": lambda d: d["lm_head.weight"].update(planes=2),
    "many planes": lambda d: d["lm_head.weight"].update(planes=3),
    "no band": lambda d: d["lm_head.weight"].update(band=0),
    "a text": lambda d: d["lm_head.weight"].update(rows="128"),
    "huge": lambda d: d["lm_head.weight"].update(rows=1 << 60),
    "a list": lambda d: d.update({"lm_head.weight": [1, 2, 3, 4]}),
}


@pytest.mark.parametrize("case", BAD)
def test_a_config_that_lies_is_refused(case, work, tmp_path):
    _, out = work("mixtral")
    shutil.copytree(out, tmp_path / "c")
    path = tmp_path / "c" / "config.json"
    config = json.loads(path.read_text())
    BAD[case](config["quantization_config"]["dense"])
    path.write_bytes(canonical_json(config))
    _reseal(tmp_path / "c", "config.json")
    with pytest.raises(CorruptError):
        verify(tmp_path / "c")
    with pytest.raises(CorruptError):
        qmoe.load(tmp_path / "c")


@pytest.mark.parametrize("raw", [[], 3, {"a": None}, {"a": {"rows": True}}])
def test_parse_dense_refuses(raw):
    with pytest.raises(CorruptError):
        parse_dense(raw)


@pytest.mark.parametrize(("rows", "band", "bits"), [(300, 300, 4), (300, 128, 4), (257, 64, 8)])
@pytest.mark.parametrize("known", [True, False])
def test_bands_and_planes_through_a_block(rows, band, bits, known, tmp_path):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, 96, generator=g) * torch.linspace(0.1, 3, rows)[:, None]
    weight[:, 5] *= 60  # a heavy column
    x = torch.randn(500, 96, generator=g) @ torch.randn(96, 96, generator=g)
    hessian = (x.T @ x).double() if known else None
    solver = DenseSolver(weight, hessian, bits)
    geometry = DenseGeometry("w", rows, 96, band, solver.planes)
    assert solver.planes == (2 if bits == 8 else 1)
    delta = find_step(solver, geometry, bits)
    bands = [solver.solve(slice(r.start, r.stop), delta) for r in geometry.bands]
    (tmp_path / "data").mkdir()
    (tmp_path / "journal").mkdir()
    with BlockWriter(tmp_path / "data", tmp_path / "journal", "b", 1 << 30) as block:
        sizes = [(len(r), 96) for r in geometry.bands]
        coded = [encode_planes(planes, size) for planes, size in zip(bands, sizes, strict=True)]
        report = block.add_dense(geometry, coded)
        stream = [plane for planes in coded for plane in planes]
        with pytest.raises(ValueError, match="twice"):
            block._spill.add("w.dense_offsets", torch.zeros(1))
    blobs = torch.cat([b for e in stream for b in (e.tables, e.matrices[0])])
    assert report["bytes"] == blobs.numel() + 32 * len(stream)
    # header and side data of thin bands are predicted from all rows at once: within a few percent
    assert 8 * report["bytes"] / weight.numel() == pytest.approx(bits, rel=0.1)
    sizes = torch.tensor([b.numel() for e in stream for b in (e.tables, e.matrices[0])])
    ends = sizes.cumsum(0).reshape(*geometry.offsets_shape[:2], 2)
    begins = ends - sizes.reshape(ends.shape)
    offsets = torch.stack([begins, ends], -1).flatten(2)
    decoded = StoredMatrix(geometry, blobs, offsets).decode()
    exact = torch.cat([sum(m.dequantize() for m in planes) for planes in bands])
    assert torch.equal(decoded, exact)
    error = (decoded - weight).norm() / weight.norm()
    assert error < (0.02 if bits == 8 else 0.35)
    bad = offsets.clone()
    bad[-1, -1, 3] += 4
    with pytest.raises(CorruptError, match="of a stream of"):
        StoredMatrix(geometry, blobs, bad)


def test_the_hessian_guides_the_error():
    """At equal bits the output error is below that of a solver that knows nothing."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 128, generator=g)
    x = torch.randn(2000, 16, generator=g) @ torch.randn(16, 128, generator=g)
    x += 0.1 * torch.randn(2000, 128, generator=g)
    geometry = DenseGeometry("w", 256, 128, 256, 1)
    errors = []
    for hessian in ((x.T @ x).double(), torch.zeros(128, 128, dtype=torch.float64)):
        solver = DenseSolver(weight, hessian, 4.0)
        planes = solver.solve(slice(None), find_step(solver, geometry, 4.0))
        errors.append(float((x @ (planes[0].dequantize() - weight).T).norm()))
    assert solver.note.startswith("no inputs")
    assert errors[0] < 0.6 * errors[1]
