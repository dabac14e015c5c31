"""Windows of calibration text, and span corruption."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qmoe.calib.text import span_corruption, windows
from qmoe.cli import main
from qmoe.errors import CalibrationError

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CALIB = EXAMPLES / "text" / "calib.txt"
WORDS = [f"w{i}" for i in range(200)]
CHAT = "{% for m in messages %}w0 {{ m.content }} w1 {% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(12))]
    vocab = {w: i for i, w in enumerate([*special, *WORDS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def number(tokenizer, *words):
    return tokenizer.convert_tokens_to_ids(list(words))


def jsonl(path, *rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


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


def test_chat_template(tmp_path, tokenizer):
    rows = [{"messages": [{"role": "user", "content": "w5"}]}, {"text": "w6"}]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    with pytest.raises(CalibrationError, match="no chat template"):
        windows(tokenizer, path, 100, 4, chat=True)
    tokenizer.chat_template = CHAT
    got = windows(tokenizer, path, 100, 8, chat=True)
    tokenizer.chat_template = None
    assert got.tolist() == [
        number(tokenizer, *["w0", "w5", "w1", "</s>", "w0", "w6", "w1", "</s>"])
    ]


def test_messages_that_the_template_refuses(tmp_path, tokenizer):
    path = jsonl(tmp_path / "a.jsonl", {"messages": [{"role": "user"}]})
    tokenizer.chat_template = "{{ raise_exception('no content') }}"
    with pytest.raises(CalibrationError, match=r"does not take the messages .*no content"):
        windows(tokenizer, path, 100, 4, chat=True)
    tokenizer.chat_template = None


def test_options_of_the_command_line(tmp_path, tiny):
    source = tiny.save("mixtral", tmp_path / "source")
    tiny.save_tokenizer(source)
    rows = [{"body": " ".join(f"w{(7 * i + j) % 34}" for j in range(20))} for i in range(30)]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    fixed = ["compress", str(source), "--calib", str(path), "--method", "rtn", "--ctx", "32"]

    def run(name, *options, code=0):
        line = [*fixed, str(tmp_path / name), "--calib-tokens", "256", *options]
        done = CliRunner().invoke(main, line)
        assert done.exit_code == code, (done.output, done.exception)
        manifest = tmp_path / name / "qmoe_manifest.json"
        return done.stderr if code else json.loads(manifest.read_text())["settings"]

    assert "line 1 has no text in 'text' (its columns: body)" in run("a", code=2)
    column = ["--calib-column", "body"]
    assert "none of the 30 documents" in run("a", *column, code=2)
    assert "the tokenizer has no chat template" in run("a", *column, "--calib-chat", code=2)
    assert run("a", *column, "--calib-pack")["calib_rows"] == {"column": "body", "pack": True}
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHAT}))
    assert run("b", *column, "--calib-chat")["calib_rows"] == {"column": "body", "chat": True}
    packed, chat = (
        json.loads((tmp_path / n / "qmoe_manifest.json").read_text())["report"]["modules"]
        for n in "ab"
    )
    assert [m["tokens"] for m in packed.values()] != [m["tokens"] for m in chat.values()]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (['{"text": "w1"', '{"text": "w1"}'], "line 1 is no JSON"),
        (['{"text": "w1"}', "[1]"], "line 2 is no JSON object"),
        (['{"text": "w1"}', '{"body": "w1"}'], "line 2 has no text in 'text'.*body"),
        (['{"text": "w1 w2"}'], "none of the 1 documents.*longest has 2"),
        ([""], "none of the 0 documents"),
    ],
)
def test_bad_rows(tmp_path, tokenizer, rows, words):
    with pytest.raises(CalibrationError, match=words):
        windows(tokenizer, jsonl(tmp_path / "a.jsonl", *rows), 40, 4)


def test_bad_sources(tmp_path, tokenizer):
    short = tmp_path / "s.txt"
    short.write_text("w1 w2 w3")
    with pytest.raises(CalibrationError, match="3 tokens, less than one window of 4"):
        windows(tokenizer, short, 40, 4)
    with pytest.raises(CalibrationError, match="plain text"):
        windows(tokenizer, short, 40, 4, chat=True)
    for nothing in (tmp_path / "no.txt", tmp_path, "./no"):
        with pytest.raises(CalibrationError, match="is not a file"):
            windows(tokenizer, nothing, 40, 4)
    with pytest.raises(CalibrationError, match="at least one window"):
        windows(tokenizer, short, 3, 4)


def test_missing_datasets(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as on a machine without it
    with pytest.raises(CalibrationError, match="pip install datasets"):
        windows(tokenizer, "owner/name", 40, 4)


def test_parquet(tmp_path, tokenizer):
    path = tmp_path / "a.parquet"
    if importlib.util.find_spec("pyarrow") is None:
        path.write_bytes(b"PAR1")
        with pytest.raises(CalibrationError, match="pip install pyarrow"):
            windows(tokenizer, path, 40, 4)
        return
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["w1 w2 w3 w4", "w5"], "n": [1, 2]}), path)
    expected = [number(tokenizer, "w1", "w2", "w3", "w4")]
    assert windows(tokenizer, path, 40, 4).tolist() == expected
    with pytest.raises(CalibrationError, match=r"no column 'x' .*text, n"):
        windows(tokenizer, path, 40, 4, column="x")


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
