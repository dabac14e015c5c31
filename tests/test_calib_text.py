"""Windows of calibration text, and span corruption."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qmoe.calib.batches import prepare
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


ROWS = [{"body": " ".join(WORDS[i : i + 12]), "n": str(i)} for i in range(0, 40, 10)]


def _written(path, rows):
    """Rows in the format of a file's ending."""
    kind = path.suffix.lower()
    if kind == ".json":
        path.write_text(json.dumps(rows))
    elif kind in (".jsonl", ".ndjson"):
        jsonl(path, *rows)
    else:
        cut = "," if kind == ".csv" else "\t"
        lines = [cut.join(rows[0]), *(cut.join(f'"{v}"' for v in r.values()) for r in rows)]
        path.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "name", ["a.json", "a.JSON", "a.jsonl", "a.JSONL", "a.ndjson", "a.csv", "a.CSV", "a.tsv"]
)
def test_files_of_rows_are_read_by_their_kind(tmp_path, tokenizer, name):
    path = _written(tmp_path / name, ROWS)
    expected = windows(tokenizer, jsonl(tmp_path / "b.jsonl", *ROWS), 400, 6, column="body")
    assert torch.equal(windows(tokenizer, path, 400, 6, column="body"), expected)
    assert len(expected) == 2 * len(ROWS)
    for wrong in ({"column": "nope"}, {}):
        with pytest.raises(CalibrationError, match=r"no text in .*its columns: body, n"):
            windows(tokenizer, path, 400, 6, **wrong)


@pytest.mark.parametrize(
    "value",
    [
        {"data": ROWS, "version": 1},
        ROWS[0],
        [r["body"] for r in ROWS],
    ],
)
def test_other_shapes_of_json(tmp_path, tokenizer, value):
    (tmp_path / "a.json").write_text(json.dumps(value, indent=1))
    options = {} if isinstance(value, list) else {"column": "body"}
    got = windows(tokenizer, tmp_path / "a.json", 400, 12, **options)
    assert got[0].tolist() == number(tokenizer, *ROWS[0]["body"].split())


def test_json_lines_under_the_name_json(tmp_path, tokenizer):
    path = jsonl(tmp_path / "b.jsonl", *ROWS).rename(tmp_path / "a.json")
    assert len(windows(tokenizer, path, 400, 12, column="body")) == len(ROWS)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", "{", "cannot be read as JSON"),
        ("a.json", "", "cannot be read as JSON"),
        ("a.json", "3", "no list of rows"),
        ("a.json", '{"a": 1}', "no list of rows"),
        ("a.json", "[[1]]", "row 1 is no JSON object"),
        ("a.json", "[" * 100000, "cannot be read as JSON"),
        ("a.jsonl", '{"text": null}', "no text in 'text'"),
        ("a.csv", 'text,n\n"open,1', "cannot be read as CSV"),
        ("a.csv", "text,n\na,b,c", "line 2 has more fields than the header"),
        ("a.csv", "", "none of the 0 documents"),
    ],
)
def test_files_of_rows_that_are_damaged(tmp_path, tokenizer, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(CalibrationError, match=words):
        windows(tokenizer, tmp_path / name, 40, 4)


def test_quoted_newlines_stay_in_their_field(tmp_path, tokenizer):
    (tmp_path / "a.csv").write_text('n,text\n1,"w1 w2\nw3, w4"\n2,"w5 ""w6"" w7 w8"\n')
    got = windows(tokenizer, tmp_path / "a.csv", 40, 4)
    assert got.tolist()[0] == number(tokenizer, "w1", "w2", "w3,", "w4")
    assert len(got) == 2


def test_options_that_do_not_apply_to_plain_text(tmp_path, tokenizer):
    path = tmp_path / "a.TXT"
    path.write_text(" ".join(WORDS))
    for options in ({"pack": True}, {"chat": True}, {"column": "text"}):
        with pytest.raises(CalibrationError, match="is plain text"):
            windows(tokenizer, path, 40, 4, **options)


def test_a_column_that_is_named_is_the_only_one_for_chat(tmp_path, tokenizer):
    rows = [{"messages": [{"role": "user", "content": "w5"}], "talk": "w6 w7"}]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    tokenizer.chat_template = CHAT
    try:
        got = windows(tokenizer, path, 100, 5, chat=True, column="talk")
        assert got.tolist() == [number(tokenizer, "w0", "w6", "w7", "w1", "</s>")]
        with pytest.raises(CalibrationError, match="in 'nope'"):
            windows(tokenizer, path, 100, 5, chat=True, column="nope")
    finally:
        tokenizer.chat_template = None


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
