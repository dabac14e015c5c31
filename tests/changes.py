"""Single changes of what a user brings: configuration, tokenizer, tensors, files, text, options.
Each takes a `random.Random`, makes its change in place and says what it was. tests/mutations.py
looks at what comes of them.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

NUMBERS = (-1, 0, 1, 3, 1.5, 10**6, 10**9, float("nan"))
VALUES = (None, True, "nonesuch", "", *NUMBERS, [], [1], {}, {"a": 1})
DTYPES = (torch.int8, torch.uint8, torch.int64, torch.float16, torch.float64, torch.bool)


def _json(path: Path, change: Callable[[Any], str]) -> str:
    value = json.loads(path.read_text())
    said = change(value)
    path.write_text(json.dumps(value))
    return f"{path.name}: {said}"


def _somewhere(rng: random.Random, value: Any) -> tuple[Any, Any]:
    """A container inside a JSON value, and a key of it."""
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    inner = value[key]
    if isinstance(inner, dict | list) and inner and rng.random() < 0.7:
        return _somewhere(rng, inner)
    return value, key


def change_json(rng: random.Random, path: Path) -> str:
    """One key removed, of another value, doubled under another name; or the text damaged."""
    if rng.random() < 0.1:
        text = path.read_text()
        at = rng.randrange(len(text))
        path.write_text(rng.choice([text[:at], text[:at] + "\x00" + text[at:], "", "[]", "null"]))
        return f"{path.name}: text damaged at {at}"

    def change(value: Any) -> str:
        owner, key = _somewhere(rng, value)
        what = rng.choice(["removed", "value", "value", "value", "renamed"])
        if what == "removed":
            del owner[key]
        elif what == "value" or isinstance(owner, list):
            new = rng.choice([*VALUES, str(owner[key]), [owner[key]]])
            if isinstance(owner[key], int) and rng.random() < 0.4:
                new = owner[key] * 2
            owner[key] = new
            what = f"is now {new!r}"
        else:
            owner[f"{key}_"] = owner.pop(key)
        return f"{key} {what}"

    return _json(path, change)


def change_tensor(rng: random.Random, source: Path) -> str:
    """One tensor renamed, reshaped, of another type, with other values, missing, or doubled."""
    file = rng.choice(sorted(source.glob("*.safetensors")))
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    t = tensors[name]
    what = rng.choice(["missing", "renamed", "dtype", "shape", "transposed", "nan", "doubled", "0"])
    if what in ("missing", "renamed"):
        del tensors[name]
    if what == "renamed":
        tensors[rng.choice(["model." + name, name + "_", name.replace("0", "7"), "x"])] = t
    elif what == "dtype":
        kind = rng.choice(DTYPES)
        tensors[name], what = t.to(kind), f"is {kind}"
    elif what == "shape":
        tensors[name] = t[:-1].clone() if rng.random() < 0.5 else torch.cat([t, t[:1]])
    elif what == "transposed" and t.ndim > 1:
        tensors[name] = t.transpose(-1, -2).contiguous()
    elif what == "nan":
        tensors[name] = t.clone()
        tensors[name].view(-1)[0] = rng.choice([float("nan"), float("inf"), 1e38])
    elif what == "doubled":
        tensors["lm_head.weight"] = t.clone()
    elif what == "0":
        tensors[name] = t.new_zeros(rng.choice([(0,), (), (0, *t.shape[1:])]))
    save_file(tensors, file, {"format": "pt"})
    return f"{file.name}: {name} {what}"


def change_files(rng: random.Random, source: Path) -> str:
    """Other files beside the weights, an index that says something else, a file cut off."""
    file = source / "model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    what = rng.choice(["stale", "shards", "bin", "cut", "header", "subfolder", "other", "index"])
    if what == "stale":
        where = {n: f"model-{i % 2}.safetensors" for i, n in enumerate(names)}
        _write_index(source, where)
    elif what == "bin":
        torch.save(tensors, source / "pytorch_model.bin")
        if rng.random() < 0.7:
            file.unlink()
    elif what == "cut":
        data = file.read_bytes()
        file.write_bytes(data[: rng.randrange(len(data))])
    elif what == "header":
        data = bytearray(file.read_bytes())
        data[rng.randrange(200)] ^= 1 << rng.randrange(8)
        file.write_bytes(bytes(data))
    elif what == "other":
        file.rename(source / rng.choice(["weights.safetensors", "model.pt", "consolidated.pth"]))
    else:
        folder = "sub/" if what == "subfolder" else ""
        (source / "sub").mkdir()
        parts = {f"{folder}model-{i}.safetensors": names[i::2] for i in range(2)}
        for name, some in parts.items():
            save_file({n: tensors[n] for n in some}, source / name, {"format": "pt"})
        where = {n: name for name, some in parts.items() for n in some}
        if what == "index":
            what += " " + _lie(rng, where)
        if rng.random() < 0.8:
            file.unlink()
        _write_index(source, where)
    return f"files: {what}"


def _write_index(source: Path, where: dict[str, Any]) -> None:
    index = {"metadata": {}, "weight_map": where}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def _lie(rng: random.Random, where: dict[str, Any]) -> str:
    name = rng.choice(sorted(where))
    new = rng.choice(["removed", "ghost.safetensors", "model-1.safetensors", 3, None, "../x", "/x"])
    if new == "removed":
        del where[name]
    else:
        where[name] = new
    return f"{name} {new}"


def change_text(rng: random.Random, text: Path) -> tuple[Path, str, bool]:
    """A file of rows, one of which is malformed, or plain text with odd characters.

    Returns:
        The file, what it is, and whether all of it is text.
    """
    words = text.read_text()
    rows = [{"text": " ".join(words.split()[40 * i : 40 * i + 40])} for i in range(8)]
    kind = rng.choice(["json", "JSONL", "csv", "tsv", "txt", "jsonl", "md"])
    path = text.with_name(f"rows.{kind}")
    bad = rng.choice([None, 3, "", [], {}, "w1", {"text": 3}, {"body": "w1"}, {"text": None}])
    at = rng.randrange(len(rows))
    mixed: list[Any] = [*rows[:at], bad, *rows[at:]]
    fine = False
    if kind == "json":
        value = rng.choice([mixed, rows, {"data": rows}, {"text": words}, bad])
        fine = value in (rows, {"data": rows}, {"text": words}, []) or (
            value is mixed and isinstance(bad, str)  # a text without a name is one
        )
        path.write_text(json.dumps(value))
    elif kind.lower() == "jsonl":
        path.write_text("\n".join(map(json.dumps, mixed)))
    elif kind in ("csv", "tsv"):
        cut = "," if kind == "csv" else "\t"
        lines = [f"text{cut}n", *(f'"{r["text"]}"{cut}1' for r in rows)]
        odd = rng.choice(['"open', "a,b,c,d", "", '"a\nb",1', "\x00"])
        fine = odd not in ('"open', "a,b,c,d" if kind == "csv" else '"a\nb",1')
        lines.insert(at + 1, odd)
        path.write_text("\n".join(lines))
        bad = odd
    else:
        odd = rng.choice(["\x00", "\ud800", "\ufeff", "é" * 100, "<s>", "</s>" * 50, "w99999"])
        fine = odd != "\ud800"
        path.write_text(words[:100] + odd + words[100:], "utf-8", "surrogatepass")
        bad = odd
    return path, f"{path.name}, row {at}: {bad!r}", fine


OPTIONS = {
    "--ctx": ("0", "1", "2", "3", "10000000", "x", "-5"),
    "--calib-tokens": ("0", "1", "63", "10000000000", "x"),
    "--bits": ("0", "-1", "0.0001", "100", "nan", "inf"),
    "--delta": ("0", "-1", "nan", "inf", "1e-30", "1e30"),
    "--memory": ("0", "1", "1KB", "10ZB", "x", "1e400", "99999999999999TiB"),
    "--calib-column": ("", "x"),
    "--calib-bos": ("on", "off", "x"),
    "--device": ("x", "cuda:99", "meta", ""),
    "--seed": ("-1", "99999999999999999999", "x"),
    "--dense-bits": ("8", "5", "nan", "-inf"),
    "--model-bits": ("nan", "inf", "0", "x"),
    "--method": ("rtn", "x"),
    "--unseen": ("0", "-1", "1e9", "x", "nan", "inf"),
    "--source-cache": ("drop",),
    "--calib": ("/nowhere", "", ".", "a" * 5000, "\x00", "a:b:c:d"),
}
