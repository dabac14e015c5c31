"""Calibration and evaluation text: files and datasets -> windows of token ids. Knows no models.

A window never straddles two documents, unless documents are packed with the end-of-text token
between them. It begins as the model's inputs do: with the tokens that the tokenizer puts before a
text. Sources are read only as far as the windows need.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from qmoe.calib.documents import TABLES, documents, is_table, optional, refuse_rows
from qmoe.errors import CalibrationError, reason

CHARACTERS_PER_TOKEN = (
    8  # first guess of how much text to read; more is read if it does not suffice
)
SUFFIXES = (".txt", ".text", ".md", *TABLES)
BEGINNINGS = ("auto", "on", "off")


class Rows(TypedDict, total=False):
    """How the rows of a text become windows.

    Attributes:
        pack: join documents.
        chat: apply the tokenizer's chat template to each row's messages (or to its text, as one
            user message); implies `pack`.
        column: of the text or the messages; by default "text", for `chat` first "messages".
        bos: "auto" begins every window as the tokenizer begins a text (in a chat: if the template
            begins so, too); "on" with its begin-of-text token, "off" with nothing.
    """

    pack: bool
    chat: bool
    column: str | None
    bos: str


def windows(
    tokenizer: Any,
    source: str | Path,
    tokens: int,
    ctx: int,
    seed: int = 0,
    **rows: Unpack[Rows],
) -> Tensor:
    """The first ``tokens // ctx`` windows of a text.

    A plain text file is one document, cut from its beginning. In json, jsonl, csv, parquet and
    datasets every row is a document: its windows lie back to back, at an offset drawn from what
    does not fill a window; rows shorter than a window are passed over. With `pack`, documents are
    joined with the end-of-text token and cut like one.

    Args:
        tokenizer: a transformers tokenizer.
        source: a text file, a file of rows (see `qmoe.calib.documents`), or the name of a dataset
            on the hub, as "owner/name", "owner/name:split" or "owner/name:configuration:split"
            (needs `datasets`).
        tokens: how many tokens are wanted; fewer are returned if the source ends.
        ctx: tokens per window, those at its beginning included.
        seed: of the offsets.
        rows: how they are read, see `Rows`.

    Returns:
        int64 [n, ctx], 1 <= n <= tokens // ctx.

    Raises:
        CalibrationError: no such source, an unreadable row, an optional library that is missing, an
            option that does not apply, or less text than one window.
    """
    count = window_count(tokens, ctx)
    pack, chat = rows.get("pack", False), rows.get("chat", False)
    column, bos = rows.get("column"), rows.get("bos", "auto")
    start = beginning(tokenizer, bos)
    if len(start) >= ctx:
        raise CalibrationError(
            f"windows of {ctx} tokens have no room for text behind the {len(start)} tokens that "
            "begin them; use a larger --ctx"
        )
    path = Path(source)
    if _is_plain(path, str(source)):
        _check_plain(path, {"chat": chat, "pack": pack, "column": column is not None})
        ids = _plain(tokenizer, path, count * ctx)
    else:
        found = documents(path, str(source), column, chat)
        texts = (_encode(tokenizer, row, chat) for row in found)
        if not (pack or chat):
            return _separate(texts, str(source), count, ctx, seed, start)
        ids = _packed(tokenizer, texts, count * ctx)
        if chat and bos == "auto" and ids[: len(start)] != start:
            start = []  # the template decides how a chat begins
    return cut(ids, count, ctx, str(source), start)


def window_count(tokens: int, ctx: int) -> int:
    """How many windows of `ctx` tokens are wanted.

    Raises:
        CalibrationError: none, or windows in which nothing can be predicted.
    """
    if ctx < 2 or tokens < ctx:
        raise CalibrationError(
            f"{tokens} tokens in windows of {ctx}: ask for at least one window of two tokens"
        )
    return tokens // ctx


def beginning(tokenizer: Any, bos: str = "auto") -> list[int]:
    """The tokens with which every window begins, see `windows`.

    Raises:
        CalibrationError: "on", and the tokenizer has no such token.
    """
    if bos not in BEGINNINGS:
        raise CalibrationError(f"bos is {bos!r}; choose one of {', '.join(BEGINNINGS)}")
    if bos == "off":
        return []
    if bos == "on":
        if tokenizer.bos_token_id is None:
            raise CalibrationError(
                "the tokenizer has no begin-of-text token that windows could begin with"
            )
        return [int(tokenizer.bos_token_id)]
    text = "a"
    whole, bare = _tokens(tokenizer, text), token_ids(tokenizer, text)
    for k in range(len(whole) - len(bare) + 1):
        if whole[k : k + len(bare)] == bare:
            return whole[:k]
    special = set(tokenizer.all_special_ids)
    return list(itertools.takewhile(special.__contains__, whole))


def _is_plain(path: Path, source: str) -> bool:
    """Whether a source is a file of plain text; one that is no file is the name of a dataset.

    Raises:
        CalibrationError: it looks like a file and is none.
    """
    try:
        there, file = path.exists(), path.is_file()
    except (OSError, ValueError) as e:
        raise CalibrationError(
            f"calibration text {source[:60]!r} is no path of a file ({e}); give a file of text"
        ) from e
    known = path.suffix.lower() in SUFFIXES
    if not file and (there or known or path.is_absolute() or source.startswith(".")):
        raise CalibrationError(f"calibration text {source!r} is not a file; check the path")
    return file and not is_table(path)


def _check_plain(path: Path, options: dict[str, bool]) -> None:
    refuse_rows(path)
    why = {
        "chat": "a chat template needs rows with messages",
        "pack": "it is one document, and packing joins several",
        "column": "it has no columns",
    }
    for name, given in options.items():
        if given:
            raise CalibrationError(
                f"{path} is plain text: {why[name]} (json, jsonl, csv, parquet or a dataset)"
            )


def _cut(ids: list[int], ctx: int, start: list[int]) -> Iterator[list[int]]:
    """Windows back to back, each with `start` before its text unless the text begins so."""
    at = 0
    while True:
        there = ids[at : at + len(start)] == start
        take = ctx if there else ctx - len(start)
        if len(ids) - at < take:
            return
        text = ids[at : at + take]
        yield text if there else [*start, *text]
        at += take


def _fitting(ids: list[int], ctx: int, start: list[int]) -> int:
    return sum(1 for _ in _cut(ids, ctx, start))


def span_corruption(
    ids: Tensor,
    tokenizer: Any,
    seed: int = 0,
    rate: float = 0.15,
    mean: float = 3.0,
    start: Sequence[int] = (),
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
        start: tokens that every encoder input begins with.

    Returns:
        input_ids [n, start + window - masked + spans + 1], labels and decoder_input_ids
        [n, masked + spans + 2], int64.

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
    sentinels = _sentinels(tokenizer, spans + 1)
    end = torch.tensor([tokenizer.eos_token_id])
    generator = torch.Generator().manual_seed(seed)
    first = torch.tensor(list(start), dtype=torch.int64)
    inputs, labels = [], []
    for row in ids:
        kept, hidden = (_cuts(total, spans, generator) for total in (length - masked, masked))
        parts = row.split([x for pair in zip(kept, hidden, strict=True) for x in pair])
        s = sentinels[:, None]
        inputs.append(torch.cat([first, *itertools.chain(*zip(parts[::2], s, strict=False)), end]))
        labels.append(
            torch.cat([*itertools.chain(*zip(s, parts[1::2], strict=False)), s[spans], end])
        )
    target = torch.stack(labels)
    shifted = torch.full((n, 1), int(tokenizer.pad_token_id))
    return {
        "input_ids": torch.stack(inputs),
        "labels": target,
        "decoder_input_ids": torch.cat([shifted, target[:, :-1]], 1),
    }


def _sentinels(tokenizer: Any, count: int) -> Tensor:
    """Ids [count] of ``<extra_id_0>`` …"""
    known = tokenizer.get_vocab()
    names = [f"<extra_id_{i}>" for i in range(count)]
    absent = [s for s in names if s not in known]
    if absent or tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        lacks = absent[0] if absent else "an end-of-text or padding token"
        raise CalibrationError(
            f"the tokenizer lacks {lacks}, which span corruption needs; is this an "
            "encoder-decoder model?"
        )
    return torch.tensor([known[s] for s in names])


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
            with path.open(encoding="utf-8-sig") as f:
                text = f.read(characters)
                at_end = not f.read(1)
            ids = token_ids(tokenizer, text)
            if at_end or len(ids) >= need:
                return ids[:need]
            characters *= 2
    except (OSError, UnicodeDecodeError) as e:
        raise CalibrationError(f"{path} cannot be read as UTF-8 text ({e})") from e


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text, no special tokens added.

    Raises:
        CalibrationError: the tokenizer cannot encode it.
    """
    return _tokens(tokenizer, text, add_special_tokens=False)


def _tokens(tokenizer: Any, text: str, **options: Any) -> list[int]:
    try:
        return list(tokenizer(text, verbose=False, **options).input_ids)
    except Exception as e:  # tokenizers raises nothing more special
        raise CalibrationError(
            f"the tokenizer cannot encode the text ({reason(e)}); is tokenizer.json intact?"
        ) from e


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
    jinja = optional("jinja2", "jinja2", "a chat template")
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (jinja.TemplateError, KeyError, TypeError, ValueError) as e:
        raise CalibrationError(
            f"the chat template does not take the messages {str(messages)[:200]} ({e}); give rows "
            "of role and content as the model knows them"
        ) from e
    return token_ids(tokenizer, text)


def cut(ids: list[int], count: int, ctx: int, source: str, start: Sequence[int] = ()) -> Tensor:
    """The first `count` windows of a token sequence, fewer if it is shorter.

    Args:
        ids: the sequence.
        count: windows that are wanted.
        ctx: tokens of a window.
        source: what to call it.
        start: tokens with which every window begins.

    Returns:
        int64 [n, ctx], 1 <= n <= count.

    Raises:
        CalibrationError: less than one window.
    """
    found = list(itertools.islice(_cut(ids, ctx, list(start)), count))
    if not found:
        raise CalibrationError(
            f"{source!r} holds {len(ids)} tokens, less than one window of {ctx}; give more "
            "text or a smaller --ctx"
        )
    return torch.tensor(found, dtype=torch.int64)


def _separate(
    texts: Iterator[list[int]], source: str, count: int, ctx: int, seed: int, start: list[int]
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    found: list[list[int]] = []
    room = ctx - len(start)
    seen = longest = 0
    for ids in texts:
        seen, longest = seen + 1, max(longest, len(ids))
        if len(ids) < room:
            continue
        offset = int(torch.randint(len(ids) % room + 1, (), generator=generator))
        found += itertools.islice(_cut(ids[offset:], ctx, start), count - len(found))
        if len(found) == count:
            break
    if not found:
        raise CalibrationError(
            f"none of the {seen} documents of {source!r} fills a window of {ctx} tokens (the "
            f"longest has {longest}); pack them or use a smaller --ctx"
        )
    return torch.tensor(found, dtype=torch.int64)


def _packed(tokenizer: Any, texts: Iterator[list[int]], need: int) -> list[int]:
    end = tokenizer.eos_token_id
    if end is None:
        raise CalibrationError(
            "the tokenizer has no end-of-text token, so that documents cannot be packed"
        )
    ids: list[int] = []
    for text in texts:
        ids += [*text, end]
        if len(ids) >= need:
            break
    return ids
