"""Rows of text files and datasets, each a document: JSON, JSON lines, CSV, parquet, `datasets`.

The kind of a file is that of its ending, in any case of letters. Rows are read one by one but for a
JSON array, which is read whole. Knows no tokenizer.
"""

import csv
import importlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qmoe.errors import CalibrationError

TABLES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
MESSAGES, TEXT = "messages", "text"  # columns that are looked for where none is named
_LONGEST = 2**31 - 1  # characters of one field of CSV
_LOOKED_AT = 2**20  # characters at the beginning of plain text
Rows = Iterator[tuple[str, dict[str, Any]]]


def is_table(path: Path) -> bool:
    """Whether a file holds rows rather than plain text."""
    return path.suffix.lower() in TABLES


def refuse_rows(path: Path) -> None:
    """Refuses rows under the name of plain text: brackets and keys would be calibrated on.

    Raises:
        CalibrationError: the file begins with two lines of JSON that have a text or messages.
    """
    try:
        with path.open(encoding="utf-8-sig") as f:
            lines = (line for line in f.read(_LOOKED_AT).split("\n") if line.strip())
            first = list(itertools.islice(lines, 2))
    except (OSError, UnicodeDecodeError):
        return  # whoever reads it says so
    if len(first) == 2 and all(_is_row(line) for line in first):
        raise CalibrationError(
            f"{path} holds JSON lines under a name that stands for plain text; rename it to .jsonl"
        )


def _is_row(line: str) -> bool:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and not row.keys().isdisjoint((TEXT, MESSAGES))


def documents(path: Path, source: str, column: str | None, chat: bool) -> Iterator[Any]:
    """The text, or the messages, of every row.

    Args:
        path: a file of `TABLES`; anything else is taken for the name of a dataset.
        source: as the user wrote it.
        column: of the text or the messages; None takes "text", and before it "messages" for `chat`.
        chat: lists of messages are as good as text.

    Raises:
        CalibrationError: with the place, for a row that cannot be read or lacks the column; also if
            an optional library is missing.
    """
    columns = (column,) if column is not None else (MESSAGES, TEXT) if chat else (TEXT,)
    for where, row in _rows(path, source, columns):
        value = next((row[c] for c in columns if row.get(c) is not None), None)
        if not isinstance(value, str) and not (chat and isinstance(value, list)):
            kind = "no text" if value is None or not chat else "neither text nor messages"
            raise CalibrationError(
                f"{where} has {kind} in {columns[-1]!r} (its columns: {', '.join(map(str, row))})"
            )
        yield value


def _rows(path: Path, source: str, columns: tuple[str, ...]) -> Rows:
    if not path.is_file():
        return _dataset(source)
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _parquet(path, columns)
    return _readable(path, _READERS[kind](path, columns))


def _readable(path: Path, rows: Rows) -> Rows:
    try:
        yield from rows
    except (OSError, UnicodeDecodeError) as e:
        raise CalibrationError(f"{path} cannot be read as UTF-8 text ({e})") from e
    except (ValueError, RecursionError, csv.Error) as e:
        raise CalibrationError(f"{path} cannot be read as {path.suffix[1:].upper()} ({e})") from e


def _json(path: Path, columns: tuple[str, ...]) -> Rows:
    with path.open(encoding="utf-8-sig") as f:
        first = next((line for line in f if line.strip()), "")
        rest = next((line for line in f if line.strip()), "")
    if rest and first.lstrip().startswith("{") and _parses(first):
        yield from _jsonl(path, columns)
        return
    with path.open(encoding="utf-8-sig") as f:
        value = json.load(f)
    rows = _array(path, value, columns)
    for number, row in enumerate(rows, 1):
        if isinstance(row, str) and columns[-1] == TEXT:  # a list of texts
            row = {TEXT: row}
        if not isinstance(row, dict):
            raise CalibrationError(f"{path} row {number} is no JSON object")
        yield f"{path} row {number}", row


def _array(path: Path, value: Any, columns: tuple[str, ...]) -> list[Any]:
    """The rows of a JSON file: the list that it is or, under one key, holds; an object that has the
    text itself is one row."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        if any(isinstance(value.get(c), str) for c in columns):
            return [value]
        lists = [v for v in value.values() if isinstance(v, list)]
        if len(lists) == 1 and all(isinstance(row, dict) for row in lists[0]):
            return lists[0]
    raise CalibrationError(
        f"{path} is no list of rows (a JSON array of objects, or an object with one such list); "
        "write it as JSON lines"
    )


def _parses(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _jsonl(path: Path, columns: tuple[str, ...]) -> Rows:
    with path.open(encoding="utf-8-sig") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise CalibrationError(f"{path} line {number} is no JSON ({e})") from e
            if not isinstance(row, dict):
                raise CalibrationError(f"{path} line {number} is no JSON object")
            yield f"{path} line {number}", row


def _csv(path: Path, columns: tuple[str, ...]) -> Rows:
    tabs = path.suffix.lower() == ".tsv"
    before = csv.field_size_limit(_LONGEST)
    try:
        with path.open(encoding="utf-8-sig", newline="") as f:
            rows = csv.DictReader(f, delimiter="\t" if tabs else ",", strict=True)
            for row in rows:
                where = f"{path} line {rows.line_num}"
                if None in row:
                    raise CalibrationError(
                        f"{where} has more fields than the header names; quote fields that hold "
                        f"a {'tab' if tabs else 'comma'}"
                    )
                yield where, row
    finally:
        csv.field_size_limit(before)


_READERS = {".json": _json, ".jsonl": _jsonl, ".ndjson": _jsonl, ".csv": _csv, ".tsv": _csv}


def _parquet(path: Path, columns: tuple[str, ...]) -> Rows:
    parquet = optional("pyarrow.parquet", "pyarrow", f"reading {path}")
    try:
        file = parquet.ParquetFile(path)
        present = [c for c in columns if c in file.schema_arrow.names]
        if not present:
            raise CalibrationError(
                f"{path} has no column {columns[-1]!r} (its columns: "
                f"{', '.join(file.schema_arrow.names)})"
            )
        number = 0
        for batch in file.iter_batches(batch_size=64, columns=present):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except (OSError, ValueError, KeyError, NotImplementedError) as e:  # so do pyarrow's errors
        raise CalibrationError(f"{path} cannot be read as parquet ({e})") from e


def _dataset(source: str) -> Rows:
    datasets = optional("datasets", "datasets", f"the dataset {source!r} (there is no such file)")
    name, *rest = source.split(":")
    if len(rest) > 2:
        raise CalibrationError(
            f"dataset {source!r}: expected name, name:split or name:configuration:split"
        )
    configuration, split = (rest[0] if len(rest) == 2 else None), (rest[-1] if rest else "train")
    try:
        rows = datasets.load_dataset(name, configuration, split=split, streaming=True)
    except (OSError, ValueError) as e:
        raise CalibrationError(f"dataset {source!r} cannot be loaded ({_first_line(e)})") from e
    try:
        for number, row in enumerate(rows, 1):
            yield f"{source} row {number}", row
    except (OSError, ValueError) as e:
        raise CalibrationError(f"dataset {source!r} cannot be read on ({_first_line(e)})") from e


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def optional(module: str, package: str, purpose: str) -> Any:
    """Imports a library that is no dependency.

    Raises:
        CalibrationError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise CalibrationError(f"{purpose} needs {package}: `pip install {package}`") from e
