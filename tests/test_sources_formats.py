"""Low-precision sources: decoders against independent encoders, and whole checkpoints that read as
dense ones.
"""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from qmoe.errors import SourceError
from qmoe.source.checkpoint import open_checkpoint
from qmoe.source.formats import fp8, int4, mxfp4


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (32, 48), (40, 16), (33, 65), (576, 256)])
@pytest.mark.parametrize("block", [(16, 32), (128, 128)])
def test_fp8_blocks(tiny, rows, cols, block):
    torch.manual_seed(0)
    w = torch.randn(rows, cols) * torch.rand(rows, 1)
    q, s = tiny.encoders.fp8_encode(w, block)
    dense = fp8.dequantize(q, s, block)
    assert torch.equal(dense, tiny.encoders.fp8_decode(q, s, block))
    assert ((dense.float() - w).abs() <= w.abs() / 8 + s.max()).all()


@pytest.mark.parametrize("shape", [(), (1,), (6, 1), (6,)])
def test_fp8_scales_per_row_or_tensor(tmp_path, shape):
    torch.manual_seed(0)
    q, s = torch.randn(6, 5).to(torch.float8_e4m3fn), torch.rand(shape) + 0.1
    tensors = {"a.weight": q, "a.weight_scale": s, "a.input_scale": torch.ones(1)}
    d = write(tmp_path, tensors, {"quant_method": "fbgemm_fp8"})
    ck = open_checkpoint(d)
    assert ck.names() == ["a.weight"]
    expected = (q.float() * (s if s.ndim != 1 or len(s) == 1 else s[:, None])).bfloat16()
    assert torch.equal(ck.read("a.weight"), expected)
    assert torch.equal(ck.read("a.weight", slice(2, 4)), expected[2:4])


def test_fp8_stack(tmp_path, tiny):
    torch.manual_seed(0)
    pairs = [tiny.encoders.fp8_encode(torch.randn(10, 7), (4, 4)) for _ in range(3)]
    tensors = {
        "x": torch.stack([q for q, _ in pairs]),
        "x_scale_inv": torch.stack([s for _, s in pairs]),
    }
    ck = open_checkpoint(
        write(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [4, 4]})
    )
    for e, (q, s) in enumerate(pairs):
        assert torch.equal(ck.read("x", slice(e, e + 1))[0], tiny.encoders.fp8_decode(q, s, (4, 4)))


def test_mxfp4_values_are_exact(tiny):
    torch.manual_seed(0)
    w = torch.randn(3, 5, 64) * torch.exp2(torch.randint(-40, 40, (3, 5, 1)))
    blocks, scales = tiny.encoders.mxfp4_encode(w)
    dense = mxfp4.dequantize(blocks, scales)
    assert torch.equal(dense, tiny.encoders.mxfp4_decode(blocks, scales))
    every = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16)
    tops = torch.tensor([1, 127, 252], dtype=torch.uint8)
    for t in tops:
        v = mxfp4.dequantize(every, t.expand(256))
        assert torch.equal(v, tiny.encoders.mxfp4_decode(every, t.expand(256)))
        assert v.isfinite().all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("rows", "cols", "group"), [(1, 32, 32), (6, 64, 32), (3, 20, 20), (5, 96, 96)]
)
def test_packed_ints(tiny, bits, rows, cols, group):
    torch.manual_seed(0)
    parts, dense = tiny.encoders.int4_encode(torch.randn(rows, cols), group, bits)
    got = int4.dequantize_packed(parts["weight_packed"], parts["weight_scale"], cols, bits)
    assert torch.equal(got, dense)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("shuffled", [False, True])
def test_gptq_ints(tiny, bits, version, shuffled):
    torch.manual_seed(0)
    order = torch.randperm(64) // 32 if shuffled else None
    parts, dense = tiny.encoders.gptq_encode(torch.randn(16, 64), 32, bits, version, order)
    names = ("qweight", "qzeros", "scales", "g_idx")
    got = int4.dequantize_gptq(*(parts[n] for n in names), bits, 2 - version)
    assert torch.equal(got, dense)


def write(directory, tensors, quantization):
    directory.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / "model.safetensors")
    config = {"model_type": "toy", "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


CASES = {
    "fp8": ("deepseek_v3", lambda t, d: t.to_fp8(d), {}),
    "fp8 ragged": ("deepseek_v3", lambda t, d: t.to_fp8(d, (32, 48)), {"kv_lora_rank": 24}),
    "fp8 e8m0": ("qwen3_moe", lambda t, d: t.to_fp8(d, scale="e8m0"), {}),
    "fp8 u8": ("qwen3_moe", lambda t, d: t.to_fp8(d, scale="u8"), {}),
    "mxfp4": ("gpt_oss", lambda t, d: t.to_mxfp4(d), {}),
    "int4": ("deepseek_v3", lambda t, d: t.to_int4(d), {}),
    "gptq int4": ("qwen3_moe", lambda t, d: t.to_gptq(d), {}),
    "awq int4": ("qwen3_moe", lambda t, d: t.to_awq(d), {}),
    "nvfp4": ("deepseek_v3", lambda t, d: t.to_nvfp4(d), {}),
    "nvfp4 compressed-tensors": ("mixtral", lambda t, d: t.to_nvfp4(d, "llm-compressor"), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_checkpoint_reads_as_the_dense_one(tmp_path, tiny, case):
    family, convert, changes = CASES[case]
    d = tiny.save(family, tmp_path / "src", **changes)
    dense = convert(tiny, d)
    tiny.to_shards(d, 3)
    ck = open_checkpoint(d)
    assert ck.quantization.startswith(case.split()[0])
    assert "quantization_config" not in ck.config
    assert ck.names() == sorted(dense)
    touched = 0
    for name, value in dense.items():
        assert ck.shape(name) == tuple(value.shape)
        assert ck.dtype(name) == value.dtype
        assert torch.equal(ck.read(name), value), name
        if value.ndim > 1 and value.dtype == torch.bfloat16:
            touched += 1
            n = len(value)
            for pick in (slice(1, 2), slice(n // 3, n // 2 + 1), -1, (slice(0, 2), slice(3, 5))):
                assert torch.equal(ck.read(name, pick), value[pick]), (name, pick)
            assert ck.stored_bytes(name) < value.numel() * 1.3
    assert touched >= 6
    sizes = sum(f.stat().st_size for f in d.glob("*.safetensors"))
    assert ck.source_bytes == sizes


def test_one_expert_of_a_fused_tensor_is_read_alone(tmp_path, tiny, monkeypatch):
    import qmoe.source.shards as shard

    d = tiny.save("gpt_oss", tmp_path / "src")
    tiny.to_mxfp4(d)
    ck = open_checkpoint(d)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    read = []
    real = shard.os.preadv
    monkeypatch.setattr(shard.os, "preadv", lambda *a: read.append(real(*a)) or read[-1])
    e, rows, cols = ck.read(name, slice(2, 3)).shape
    assert e == 1
    assert sum(read) == rows * cols // 2 + rows * cols // 32


def edit(d, change):
    from safetensors.torch import load_file

    tensors = load_file(d / "model.safetensors")
    change(tensors)
    save_file(tensors, d / "model.safetensors")


def drop(pattern):
    def change(t):
        t.pop(next(k for k in sorted(t) if re.search(pattern, k)))

    return change


def cut(pattern):
    def change(t):
        name = next(k for k in sorted(t) if re.search(pattern, k))
        t[name] = t[name][1:].clone()

    return change


def lie(t):
    name = next(k for k in sorted(t) if k.endswith("weight_shape"))
    t[name] = t[name] * 2


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [
        ("fp8", cut("scale_inv$"), "scale .*weight_scale_inv.* does not fit .*blocks of 16 x 16"),
        ("fp8", drop("scale_inv$"), "without a scale beside it"),
        ("mxfp4", drop("_scales$"), "has no .*_scales"),
        ("mxfp4", drop("_blocks$"), "have no blocks"),
        ("mxfp4", cut("_scales$"), "do not fit"),
        ("int4", drop("weight_scale$"), "weight_scale' is not in the checkpoint"),
        ("int4", lie, r"weight_shape' says \[\d+, \d+\], but the words are"),
        ("gptq int4", cut("qzeros$"), "do not fit each other at 4 bits and group size 32"),
        ("gptq int4", drop("scales$"), "scales' is not in the checkpoint"),
    ],
)
def test_inconsistent_parts(tmp_path, tiny, case, change, words):
    family, convert, _ = CASES[case]
    d = tiny.save(family, tmp_path / "src")
    convert(tiny, d)
    edit(d, change)
    with pytest.raises(SourceError, match=words) as e:
        open_checkpoint(d)
    assert "\n" not in str(e.value)


def test_gptq_group_out_of_range(tmp_path, tiny):
    parts, _ = tiny.encoders.gptq_encode(torch.randn(16, 64), 32)
    parts["g_idx"][3] = 9
    tensors = {f"a.{k}": v for k, v in parts.items()}
    d = write(tmp_path, tensors, {"quant_method": "gptq", "bits": 4, "group_size": 32})
    with pytest.raises(SourceError, match=r"'a.g_idx' names groups 0..9"):
        open_checkpoint(d).read("a.weight")


def test_hidden_parts_are_no_tensors(tmp_path, tiny):
    parts, _ = tiny.encoders.int4_encode(torch.randn(4, 32), 32)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": weights}},
    }
    d = write(tmp_path, {f"a.{k}": v for k, v in parts.items()}, settings)
    ck = open_checkpoint(d)
    assert ck.names() == ["a.weight"]
    with pytest.raises(SourceError, match="part of a quantized tensor"):
        ck.read("a.weight_packed")


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "switch_transformers", "dbrx"])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_families_in_shards(tmp_path, tiny, family, ending):
    d = tiny.save(family, tmp_path / "src", torch.bfloat16)
    dense = tiny.load_all(d)
    tiny.to_shards(d, 4, ending)
    ck = open_checkpoint(d)
    assert ck.names() == sorted(dense)
    assert all(torch.equal(ck.read(k), v) for k, v in dense.items())
