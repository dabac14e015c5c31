"""Windows of calibration text, and span corruption."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from words import CHAT, WORDS, jsonl, make_tokenizer, number

from qmoe.calib.batches import prepare
from qmoe.calib.text import span_corruption, windows
from qmoe.errors import CalibrationError

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CALIB = EXAMPLES / "text" / "calib.txt"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_plain_text_in_file_order():
    tok = AutoTokenizer.from_pretrained(EXAMPLES / "tiny-mixtral")
    got = windows(tok, CALIB, 65536, 256)
    assert got.shape == (256, 256)
    assert got.dtype == torch.int64
    text = CALIB.read_text(encoding="utf-8")[: 65536 * 8]
    whole = torch.tensor(tok(text, verbose=False, add_special_tokens=False).input_ids)
    assert torch.equal(got.flatten(), whole[:65536])
    assert torch.equal(windows(tok, CALIB, 1000, 256), got[:3])


def test_long_words_make_it_read_on(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text((" " * 100 + "w3") * 50)
    assert windows(tokenizer, path, 40, 10).shape == (4, 10)


def test_reads_only_a_prefix(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_bytes(b"w1 w2 " * 20000 + b"\xff\xfe not utf-8")
    assert windows(tokenizer, path, 64, 8).shape == (8, 8)
    with pytest.raises(CalibrationError, match="UTF-8"):
        windows(tokenizer, path, 200000, 8)


def test_windows_do_not_straddle_documents(tmp_path, tokenizer):
    docs = [[f"w{10 * i + j}" for j in range(n)] for i, n in enumerate((9, 3, 8, 4))]
    path = jsonl(tmp_path / "a.jsonl", *({"text": " ".join(d)} for d in docs))
    got = windows(tokenizer, path, 400, 4)
    assert len(got) == 2 + 0 + 2 + 1
    own = [set(number(tokenizer, *d)) for d in docs]
    assert all(any(set(w) <= o for o in own) for w in got.tolist())
    assert torch.equal(got, windows(tokenizer, path, 400, 4))
    firsts = {int(windows(tokenizer, path, 400, 4, seed=s)[0, 0]) for s in range(20)}
    assert firsts == set(number(tokenizer, "w0", "w1"))
    assert torch.equal(windows(tokenizer, path, 4, 4), got[:1])


def test_packing_puts_the_end_token_between(tmp_path, tokenizer):
    path = jsonl(tmp_path / "a.jsonl", {"text": "w1 w2"}, "", {"text": "w3 w4 w5"})
    got = windows(tokenizer, path, 100, 7, pack=True)
    assert got.tolist() == [number(tokenizer, *["w1", "w2", "</s>", "w3", "w4", "w5", "</s>"])]


@pytest.mark.parametrize(("length", "masked", "spans"), [(180, 27, 9), (10, 2, 1), (2, 1, 1)])
def test_span_corruption(tokenizer, length, masked, spans):
    torch.manual_seed(0)
    ids = torch.randint(15, 215, (20, length))
    out = span_corruption(ids, tokenizer, seed=3)
    sentinels = number(tokenizer, *(f"<extra_id_{i}>" for i in range(spans + 1)))
    assert out["input_ids"].shape == (20, length - masked + spans + 1)
    assert out["labels"].shape == (20, masked + spans + 2)
    for row, x, y in zip(
        *(t.tolist() for t in (ids, out["input_ids"], out["labels"])), strict=True
    ):
        assert x[-1] == y[-1] == tokenizer.eos_token_id
        assert y[-2] == sentinels[spans]
        hidden, at = {}, None
        for t in y[:-2]:  # put the spans back where their sentinels are
            if t in sentinels:
                at = t
                hidden[at] = []
            else:
                hidden[at].append(t)
        assert list(hidden) == sentinels[:spans]
        assert all(hidden.values())
        assert [t for u in x[:-1] for t in hidden.get(u, [u])] == row
        assert x[0] not in hidden
    assert torch.equal(out["decoder_input_ids"][:, 1:], out["labels"][:, :-1])
    assert (out["decoder_input_ids"][:, 0] == tokenizer.pad_token_id).all()
    again = span_corruption(ids, tokenizer, seed=3)
    assert all(torch.equal(out[k], again[k]) for k in out)
    if spans > 1:
        assert not torch.equal(out["labels"], span_corruption(ids, tokenizer, seed=4)["labels"])


def test_span_corruption_needs_sentinels(tokenizer):
    with pytest.raises(CalibrationError, match="lacks <extra_id_12>"):
        span_corruption(torch.full((1, 400), 20), tokenizer)
    with pytest.raises(CalibrationError, match="too short"):
        span_corruption(torch.full((1, 1), 20), tokenizer)


@pytest.fixture
def beginning_tokenizer(tokenizer):
    """Begins a text with <pad> <extra_id_9> and ends it with </s>."""
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    ids = {name: number(tokenizer, name)[0] for name in ("<pad>", "<extra_id_9>", "</s>")}
    core.post_processor = TemplateProcessing(
        single="<pad> <extra_id_9> $A </s>", special_tokens=list(ids.items())
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def test_windows_begin_as_the_tokenizer_begins_a_text(tmp_path, beginning_tokenizer):
    tok = beginning_tokenizer
    path = tmp_path / "a.txt"
    path.write_text(" ".join(WORDS[:32]))
    start = number(tok, "<pad>", "<extra_id_9>")
    got = windows(tok, path, 100, 10)
    assert got.shape == (4, 10)
    assert got[:, :2].tolist() == [start] * 4
    assert got[:, 2:].flatten().tolist() == number(tok, *WORDS[:32])
    assert windows(tok, path, 100, 10, bos="off").flatten().tolist() == number(tok, *WORDS[:30])
    with pytest.raises(CalibrationError, match="no begin-of-text token"):
        windows(tok, path, 100, 10, bos="on")
    tok.bos_token = "w0"
    assert windows(tok, path, 100, 10, bos="on")[:, 0].tolist() == number(tok, "w0") * 3
    with pytest.raises(CalibrationError, match="no room for text"):
        windows(tok, path, 100, 2)


def test_rows_and_chats_begin_so_too(tmp_path, beginning_tokenizer):
    tok = beginning_tokenizer
    start = number(tok, "<pad>", "<extra_id_9>")
    rows = [{"text": " ".join(WORDS[:9])}, {"text": " ".join(WORDS[20:24])}]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    got = windows(tok, path, 100, 6)
    assert len(got) == 3  # two of the nine words, one of the four
    assert got[:, :2].tolist() == [start] * 3
    tok.chat_template = CHAT
    assert start not in windows(tok, path, 100, 6, chat=True)[:, :2].tolist()
    tok.chat_template = "<pad> <extra_id_9> " + CHAT  # begins as the tokenizer does
    got = windows(tok, path, 100, 6, chat=True)
    assert got[:, :2].tolist() == [start] * len(got)
    assert got[0, 2:].tolist() == number(tok, "w0", *WORDS[:3])  # not twice


def test_span_corruption_begins_its_inputs(tmp_path, beginning_tokenizer):
    config = type("Config", (), {"is_encoder_decoder": True})
    path = tmp_path / "a.txt"
    path.write_text(" ".join(WORDS[:32]))
    batch = prepare(beginning_tokenizer, config, str(path), 30, 10, 0)
    start = number(beginning_tokenizer, "<pad>", "<extra_id_9>")
    assert batch["input_ids"][:, :2].tolist() == [start] * 3
    plain = prepare(beginning_tokenizer, config, str(path), 30, 10, 0, bos="off")
    assert torch.equal(batch["input_ids"][:, 2:], plain["input_ids"])
    assert torch.equal(batch["labels"], plain["labels"])
