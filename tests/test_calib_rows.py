"""Rows of files and datasets as calibration text: what is read, and what is refused."""

import json
import random
import sys

import pyarrow
import pyarrow.parquet
import pytest
import torch
from click.testing import CliRunner
from words import CHAT, WORDS, jsonl, make_tokenizer, number

from qmoe.calib.text import windows
from qmoe.cli import main
from qmoe.errors import CalibrationError

ROWS = [{"body": " ".join(WORDS[i : i + 12]), "n": str(i)} for i in range(0, 40, 10)]


MESSAGES = [[{"role": "user", "content": "w6 w7"}], [{"role": "user", "content": "w8 w9"}]]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def _written(path, rows):
    """Rows in the format of a file's ending."""
    kind = path.suffix.lower()
    if kind == ".json":
        path.write_text(json.dumps(rows))
    elif kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind in (".jsonl", ".ndjson"):
        jsonl(path, *rows)
    else:
        cut = "," if kind == ".csv" else "\t"
        lines = [cut.join(rows[0]), *(cut.join(f'"{v}"' for v in r.values()) for r in rows)]
        path.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    return path


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


def test_missing_pyarrow(tmp_path, tokenizer, monkeypatch):
    _written(tmp_path / "a.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # as on a machine without it
    with pytest.raises(CalibrationError, match="pip install pyarrow"):
        windows(tokenizer, tmp_path / "a.parquet", 40, 4)


def test_chats_in_parquet(tmp_path, tokenizer):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"talk": MESSAGES, "text": ["w1", "w2"], "n": [1, None]})
    pyarrow.parquet.write_table(table, path, compression="zstd")
    tokenizer.chat_template = CHAT
    try:
        got = windows(tokenizer, path, 100, 5, chat=True, column="talk")
        assert got[0].tolist() == number(tokenizer, "w0", "w6", "w7", "w1", "</s>")
        got = windows(tokenizer, path, 100, 4, chat=True)  # no messages: text as a user's message
        assert got[0].tolist() == number(tokenizer, "w0", "w1", "w1", "</s>")
    finally:
        tokenizer.chat_template = None
    for column, words in ((None, "row 1 has no text in 'n'"), ("talk", "row 1 has no text in")):
        with pytest.raises(CalibrationError, match=words):
            windows(tokenizer, path, 100, 5, column=column or "n")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (pyarrow.array(["w1", None]), "row 2 has no text in 'text'"),
        (pyarrow.array([b"w1", b"w2"]), "row 1 has no text in 'text'"),
        (pyarrow.array([], pyarrow.string()), "none of the 0 documents"),
        (b"", "cannot be read as parquet"),
        (b'{"text": "w1"}', "cannot be read as parquet"),
    ],
)
def test_parquet_that_holds_no_text(tmp_path, tokenizer, value, words):
    path = tmp_path / "a.parquet"
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": value}), path)
    with pytest.raises(CalibrationError, match=words):
        windows(tokenizer, path, 40, 4)


def test_a_damaged_parquet_file_is_refused_or_read(tmp_path, tokenizer):
    path = _written(tmp_path / "a.parquet", ROWS * 20)
    data, drawn = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(40):
        bad = bytearray(data)
        bad[-1 - drawn.randrange(600)] ^= 1 << drawn.randrange(8)
        path.write_bytes(bad)
        try:
            windows(tokenizer, path, 40, 4, column="body")
        except CalibrationError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    "name",
    [
        *("a.json", "a.JSON", "a.jsonl", "a.JSONL", "a.ndjson", "a.csv", "a.CSV", "a.tsv"),
        *("a.parquet", "a.Parquet"),
    ],
)
def test_files_of_rows_are_read_by_their_kind(tmp_path, tokenizer, name):
    path = _written(tmp_path / name, ROWS)
    expected = windows(tokenizer, jsonl(tmp_path / "b.jsonl", *ROWS), 400, 6, column="body")
    assert torch.equal(windows(tokenizer, path, 400, 6, column="body"), expected)
    assert len(expected) == 2 * len(ROWS)
    for wrong in ({"column": "nope"}, {}):
        with pytest.raises(CalibrationError, match=r"no (text|column) .*its columns: body, n"):
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


@pytest.mark.parametrize("name", ["rows", "rows.txt", "rows.json.bak"])
def test_rows_under_the_name_of_plain_text_are_refused(tmp_path, tokenizer, name):
    path = jsonl(tmp_path / name, *({"text": " ".join(WORDS[i : i + 8])} for i in range(9)))
    with pytest.raises(CalibrationError, match=r"holds JSON lines .* rename it to \.jsonl"):
        windows(tokenizer, path, 40, 4)
    path.write_text('{"body": 1}\n{"body": 2}\n' * 9)  # JSON as a text about something else
    assert windows(tokenizer, path, 40, 4).shape == (9, 4)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_marks_and_line_ends_of_other_systems(tmp_path, tokenizer, mark, end):
    path = tmp_path / "a.txt"
    path.write_bytes(mark + end.join(WORDS[:9]).encode())
    assert windows(tokenizer, path, 8, 4).flatten().tolist() == number(tokenizer, *WORDS[:8])
