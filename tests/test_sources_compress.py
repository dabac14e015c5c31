"""Every kind of source through the whole path: compress, load, compare with the exported model."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import qmoe
from qmoe.compression.pipeline import compress
from qmoe.compression.settings import Settings
from qmoe.publish.export import export

CASES = {
    "fp8": ("deepseek_v3", lambda t, d: t.to_fp8(d, (32, 48))),
    "mxfp4": ("gpt_oss", lambda t, d: t.to_mxfp4(d)),
    "int4": ("deepseek_v3", lambda t, d: t.to_int4(d)),
    "gptq": ("qwen3_moe", lambda t, d: t.to_gptq(d)),
    "awq": ("qwen3_moe", lambda t, d: t.to_awq(d)),
    "nvfp4 modelopt": ("deepseek_v3", lambda t, d: t.to_nvfp4(d)),
    "nvfp4 compressed-tensors": ("mixtral", lambda t, d: t.to_nvfp4(d, "compressed-tensors")),
    "torch pickles": ("switch_transformers", lambda t, d: t.to_shards(d, 3, "bin")),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_source_format_to_compressed_model(tmp_path, tiny, case):
    family, convert = CASES[case]
    source = tiny.save(family, tmp_path / "src", torch.bfloat16)
    convert(tiny, source)
    tiny.save_tokenizer(source)
    text = tiny.save_text(tmp_path / "text.txt", 1500)
    settings = Settings(method="qmoe", calib=str(text), calib_tokens=1024, ctx=128)
    compress(str(source), tmp_path / "q", settings)
    model = qmoe.load(tmp_path / "q", dtype=torch.float32)
    export(tmp_path / "q", tmp_path / "dense", "float32")
    seq2seq = model.config.is_encoder_decoder
    auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    dense = auto.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    ids = torch.randint(16, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids[:, :5]} if seq2seq else {})}
    expected = dense(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
