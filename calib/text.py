"""Calibration and evaluation text: files and datasets -> windows of token ids. Knows no models.

A window never straddles two documents, unless documents are packed with the end-of-text token
between them. Sources are read only as far as the windows need.
"""

import importlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmoe.errors import CalibrationError, reason

CHARACTERS_PER_TOKEN = (
    8  # first guess of how much text to read; more is read if it does not suffice
)
TABLES = (".jsonl", ".parquet")
SUFFIXES = (".txt", ".text", ".md", *TABLES)


def windows(
    tokenizer: Any,
    source: str | Path,
    tokens: int,
    ctx: int,
    seed: int = 0,
    *,
    pack: bool = False,
    chat: bool = False,
    column: str = "text",
) -> Tensor:
    """The first ``tokens // ctx`` windows of a text.

    A plain text file is one document, cut from its beginning. In jsonl, parquet and datasets every
    row is a document: its windows lie back to back, at an offset drawn from what does not fill a
    window; rows shorter than a window are passed over. With `pack`, documents are joined with the
    end-of-text token and cut like one. No special tokens are added.

    Args:
        tokenizer: a transformers tokenizer.
        source: ``.txt``, ``.jsonl`` or ``.parquet`` file, or the name of a dataset on the hub, as
            "owner/name", "owner/name:split" or "owner/name:configuration:split" (needs `datasets`).
        tokens: how many tokens are wanted; fewer are returned if the source ends.
        ctx: tokens per window.
        seed: of the offsets.
        pack: join documents.
        chat: apply the tokenizer's chat template to each row's "messages" (or to its text, as one
            user message); implies `pack`.
        column: name of the text column.

    Returns:
        int64 [n, ctx], 1 <= n <= tokens // ctx.

    Raises:
        CalibrationError: no such source, an unreadable row, an optional library that is missing, or
            less text than one window.
    """
    if ctx < 2 or tokens < ctx:
        raise CalibrationError(
            f"{tokens} tokens in windows of {ctx}: ask for at least one window of two tokens"
        )
    count = tokens // ctx
    path = Path(source)
    if not path.is_file() and (
        path.exists()
        or path.suffix in SUFFIXES
        or path.is_absolute()
        or str(source).startswith(".")
    ):
        raise CalibrationError(f"calibration text {str(source)!r} is not a file; check the path")
    if path.is_file() and path.suffix not in TABLES:
        if chat:
            raise CalibrationError(
                f"{path} is plain text; a chat template needs rows with messages (jsonl, parquet "
                "or a dataset)"
            )
        ids = _plain(tokenizer, path, count * ctx)
    else:
        rows = _rows(path, str(source), "messages" if chat else column, column)
        documents = (_encode(tokenizer, row, chat) for row in rows)
        if not (pack or chat):
            return _separate(documents, str(source), count, ctx, seed)
        ids = _packed(tokenizer, documents, count * ctx)
    return cut(ids, count, ctx, str(source))


def span_corruption(
    ids: Tensor, tokenizer: Any, seed: int = 0, rate: float = 0.15, mean: float = 3.0
) -> dict[str, Tensor]:
    """T5's span corruption, the task that Switch Transformers were trained on.

    The encoder sees each window with every masked span replaced by ``<extra_id_0>``,
    ``<extra_id_1>``, … and ``</s>`` at the end; the labels are sentinel, span, sentinel, span, …, a
    closing sentinel, ``</s>``. Span lengths and gaps are drawn like cuts of a stick (Raffel et al.
    2020, section 3.1.4), so that all windows have equal lengths.

    Args:
        ids: int64 [n, window].
        tokenizer: has ``<extra_id_0>`` … and an end-of-text token; its padding token starts the
            decoder.
        seed: of the spans; equal seeds give equal spans.
        rate: share of masked tokens.
        mean: mean length of a span.

    Returns:
        input_ids [n, window - masked + spans + 1], labels and decoder_input_ids [n, masked + spans
        + 2], int64.

    Raises:
        CalibrationError: a window too short for one span, or a tokenizer without enough sentinels.
    """
    n, length = ids.shape
    masked = min(max(round(length * rate), 1), length - 1)
    spans = max(round(masked / mean), 1)
    if length < 2 or length - masked < spans:
        raise CalibrationError(
            f"windows of {length} tokens are too short for {spans} masked spans; use longer windows"
        )
    known = tokenizer.get_vocab()
    names = [f"<extra_id_{i}>" for i in range(spans + 1)]
    absent = [s for s in names if s not in known]
    if absent or tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        lacks = absent[0] if absent else "an end-of-text or padding token"
        raise CalibrationError(
            f"the tokenizer lacks {lacks}, which span corruption needs; is this an "
            "encoder-decoder model?"
        )
    sentinels = torch.tensor([known[s] for s in names])
    end = torch.tensor([tokenizer.eos_token_id])
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = [], []
    for row in ids:
        kept, hidden = (_cuts(total, spans, generator) for total in (length - masked, masked))
        parts = row.split([x for pair in zip(kept, hidden, strict=True) for x in pair])
        s = sentinels[:, None]
        inputs.append(torch.cat([*itertools.chain(*zip(parts[::2], s, strict=False)), end]))
        labels.append(
            torch.cat([*itertools.chain(*zip(s, parts[1::2], strict=False)), s[spans], end])
        )
    target = torch.stack(labels)
    start = torch.full((n, 1), int(tokenizer.pad_token_id))
    return {
        "input_ids": torch.stack(inputs),
        "labels": target,
        "decoder_input_ids": torch.cat([start, target[:, :-1]], 1),
    }


def _cuts(total: int, parts: int, generator: torch.Generator) -> list[int]:
    """`total` as `parts` positive integers, all such lists equally likely."""
    at = torch.randperm(total - 1, generator=generator)[: parts - 1].sort().values + 1
    edges = [0, *at.tolist(), total]
    return [b - a for a, b in itertools.pairwise(edges)]


def _plain(tokenizer: Any, path: Path, need: int) -> list[int]:
    """The first `need` ids of a text file, reading a prefix that is doubled until it suffices."""
    try:
        # a reader sizes its buffer by what it is asked for, so never ask for more than there is
        characters = min(need * CHARACTERS_PER_TOKEN, path.stat().st_size + 1)
        while True:
            with path.open(encoding="utf-8") as f:
                text = f.read(characters)
                at_end = not f.read(1)
            ids = token_ids(tokenizer, text)
            if at_end or len(ids) >= need:
                return ids[:need]
            characters *= 2
    except (OSError, UnicodeDecodeError) as e:
        raise CalibrationError(f"{path} cannot be read as UTF-8 text ({e})") from e


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text, no special tokens added."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _encode(tokenizer: Any, row: Any, chat: bool) -> list[int]:
    if not chat:
        return token_ids(tokenizer, row)
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            "the tokenizer has no chat template; calibrate on plain text instead"
        )
    return encode_messages(
        tokenizer, [{"role": "user", "content": row}] if isinstance(row, str) else row
    )


def encode_messages(tokenizer: Any, messages: Any) -> list[int]:
    """Ids of a conversation in the tokenizer's chat template.

    Args:
        tokenizer: has a template.
        messages: what the template takes, objects of "role" and "content".

    Raises:
        CalibrationError: the template does not take them, or jinja2 is missing.
    """
    jinja = _optional("jinja2", "jinja2", "a chat template")
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (jinja.TemplateError, KeyError, TypeError, ValueError) as e:
        raise CalibrationError(
            f"the chat template does not take the messages {str(messages)[:200]} ({e}); give rows "
            "of role and content as the model knows them"
        ) from e
    return token_ids(tokenizer, text)


def cut(ids: list[int], count: int, ctx: int, source: str) -> Tensor:
    """The first `count` windows of a token sequence, fewer if it is shorter.

    Returns:
        int64 [n, ctx], 1 <= n <= count.

    Raises:
        CalibrationError: less than one window.
    """
    n = min(len(ids) // ctx, count)
    if n == 0:
        raise CalibrationError(
            f"{source!r} holds {len(ids)} tokens, less than one window of {ctx}; give more "
            "text or a smaller --ctx"
        )
    return torch.tensor(ids[: n * ctx], dtype=torch.int64).view(n, ctx)


def _separate(
    documents: Iterator[list[int]], source: str, count: int, ctx: int, seed: int
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    seen = longest = n = 0
    for ids in documents:
        seen, longest = seen + 1, max(longest, len(ids))
        if len(ids) < ctx:
            continue
        start = int(torch.randint(len(ids) % ctx + 1, (), generator=generator))
        cut = torch.tensor(ids[start : start + len(ids) // ctx * ctx], dtype=torch.int64).view(
            -1, ctx
        )[: count - n]
        found.append(cut)
        n += len(cut)
        if n == count:
            break
    if not found:
        raise CalibrationError(
            f"none of the {seen} documents of {source!r} fills a window of {ctx} tokens (the "
            f"longest has {longest}); pack them or use a smaller --ctx"
        )
    return torch.cat(found)


def _packed(tokenizer: Any, documents: Iterator[list[int]], need: int) -> list[int]:
    end = tokenizer.eos_token_id
    if end is None:
        raise CalibrationError(
            "the tokenizer has no end-of-text token, so that documents cannot be packed"
        )
    ids: list[int] = []
    for document in documents:
        ids += [*document, end]
        if len(ids) >= need:
            break
    return ids


def _rows(path: Path, source: str, column: str, text: str) -> Iterator[Any]:
    """Values of `column` (or else of `text`) row by row."""
    if path.suffix == ".jsonl":
        rows: Iterator[tuple[str, dict[str, Any]]] = _jsonl(path)
    elif path.suffix == ".parquet":
        rows = _parquet(path, (column, text))
    else:
        rows = _dataset(source)
    for where, row in rows:
        value = row.get(column)
        value = row.get(text) if value is None else value
        if not isinstance(value, str) and (column == text or not isinstance(value, list)):
            raise CalibrationError(
                f"{where} has no text in {column!r} (its columns: {', '.join(map(str, row))})"
            )
        yield value


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise CalibrationError(f"{path} line {number} is no JSON object")
                yield f"{path} line {number}", row
    except json.JSONDecodeError as e:
        raise CalibrationError(f"{path} line {number} is no JSON ({e})") from e
    except (OSError, UnicodeDecodeError) as e:
        raise CalibrationError(f"{path} cannot be read as UTF-8 text ({e})") from e


def _parquet(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    parquet = _optional("pyarrow.parquet", "pyarrow", f"reading {path}")
    try:
        file = parquet.ParquetFile(path)
        present = [c for c in dict.fromkeys(columns) if c in file.schema_arrow.names]
        if not present:
            raise CalibrationError(
                f"{path} has no column {columns[0]!r} (its columns: "
                f"{', '.join(file.schema_arrow.names)})"
            )
        number = 0
        for batch in file.iter_batches(batch_size=64, columns=present):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except (OSError, ValueError) as e:  # pyarrow's errors derive from these
        raise CalibrationError(f"{path} cannot be read as parquet ({e})") from e


def _dataset(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    datasets = _optional("datasets", "datasets", f"the dataset {source!r} (there is no such file)")
    name, *rest = source.split(":")
    if len(rest) > 2:
        raise CalibrationError(
            f"dataset {source!r}: expected name, name:split or name:configuration:split"
        )
    configuration, split = (rest[0] if len(rest) == 2 else None), (rest[-1] if rest else "train")
    try:
        rows = datasets.load_dataset(name, configuration, split=split, streaming=True)
    except (OSError, ValueError) as e:
        raise CalibrationError(f"dataset {source!r} cannot be loaded ({reason(e)})") from e
    try:
        for number, row in enumerate(rows, 1):
            yield f"{source} row {number}", row
    except (OSError, ValueError) as e:
        raise CalibrationError(f"dataset {source!r} cannot be read on ({reason(e)})") from e


def _optional(module: str, package: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise CalibrationError(f"{purpose} needs {package}: `pip install {package}`") from e
