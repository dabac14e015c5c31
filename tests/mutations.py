"""Single changes of what a user brings, and what comes of them: the result of transformers' own
reading of the same input, or one sentence. tests/test_mutations.py and `python tests/mutations.py`
run them; a traceback, a hang or another result is a failure.
"""

import argparse
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import qmoe
from qmoe.calib.batches import check_tokens, prepare
from qmoe.cli import main as qmoe_command
from qmoe.errors import QmoeError
from qmoe.measure.score import load_any
from qmoe.models.auto import building
from qmoe.models.classes import read_tokenizer

FAMILIES = (
    *("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe"),
    *("llama4_text", "dbrx", "jamba", "switch_transformers", "jetmoe"),
)
SECONDS = 120  # a single change that takes longer hangs
VALUES = (None, True, "nonesuch", "", -1, 0, 1, 3, 1.5, 10**6, [], [1], {}, {"a": 1}, float("nan"))
DTYPES = (torch.int8, torch.uint8, torch.int64, torch.float16, torch.float64, torch.bool)
CPU = torch.device("cpu")
IDS = torch.randint(16, 50, (2, 12), generator=torch.Generator().manual_seed(5))


class HangError(BaseException):
    """A change took longer than `SECONDS`."""


# ---- what is changed -----------------------------------------------------------------------------


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


def change_text(rng: random.Random, text: Path) -> tuple[Path, str]:
    """A file of rows, one of which is malformed, or plain text with odd characters."""
    words = text.read_text()
    rows = [{"text": " ".join(words.split()[40 * i : 40 * i + 40])} for i in range(8)]
    kind = rng.choice(["json", "JSONL", "csv", "tsv", "txt", "jsonl", "md"])
    path = text.with_name(f"rows.{kind}")
    bad = rng.choice([None, 3, "", [], {}, "w1", {"text": 3}, {"body": "w1"}, {"text": None}])
    at = rng.randrange(len(rows))
    mixed: list[Any] = [*rows[:at], bad, *rows[at:]]
    if kind == "json":
        path.write_text(json.dumps(rng.choice([mixed, rows, {"data": rows}, {"text": words}, bad])))
    elif kind.lower() == "jsonl":
        path.write_text("\n".join(map(json.dumps, mixed)))
    elif kind in ("csv", "tsv"):
        cut = "," if kind == "csv" else "\t"
        lines = [f"text{cut}n", *(f'"{r["text"]}"{cut}1' for r in rows)]
        lines.insert(at + 1, rng.choice(['"open', "a,b,c,d", "", '"a\nb",1', "\x00"]))
        path.write_text("\n".join(lines))
    else:
        odd = rng.choice(["\x00", "\ud800", "\ufeff", "é" * 100, "<s>", "</s>" * 50, "w99999"])
        path.write_text(words[:100] + odd + words[100:], "utf-8", "surrogatepass")
    return path, f"{path.name}, row {at}: {bad!r}"


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
    "--dense-bits": ("8", "5"),
    "--method": ("rtn", "x"),
    "--unseen": ("0", "-1", "1e9", "x"),
    "--source-cache": ("drop",),
    "--calib": ("/nowhere", "", ".", "a" * 5000, "\x00", "a:b:c:d"),
}


# ---- what comes of it ----------------------------------------------------------------------------


@contextmanager
def limited() -> Iterator[None]:
    """Raises `HangError` inside after `SECONDS`."""

    def ring(*_: object) -> None:
        raise HangError(f"no answer in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of a batch of tokens."""
    extra = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    out: torch.Tensor = model(input_ids=ids, **extra, use_cache=False).logits
    return out


def theirs(source: Path, cls: Any, ids: torch.Tensor) -> torch.Tensor | None:
    """Logits of transformers' own reading; None if it fails, or fills in random numbers."""
    try:
        if re.search(r"(layers|experts|depth)\W+1000000\b", _text(source / "config.json")):
            return None  # a million layers would take all memory
        model, info = cls.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"] or info["mismatched_keys"]:
            return None
        model.eval()
        if model.config.model_type != "gpt_oss":
            model.set_experts_implementation("eager")
        return logits_of(model, ids)
    except Exception:
        return None


def _text(file: Path) -> str:
    return file.read_text(errors="replace")


class Mutator:
    """Ten tiny checkpoints, and one change after another of a copy of one of them."""

    def __init__(self, tiny: Any, folder: Path) -> None:
        self.tiny, self.folder = tiny, folder
        self.text = tiny.save_text(folder / "text.txt", 400)
        self.classes: dict[str, Any] = {}
        self.outcomes: Counter[str] = Counter()
        self.refused: list[str] = []  # what transformers reads and we refuse
        for family in FAMILIES:
            model = tiny.make(family)
            self.classes[family] = type(model)
            model.save_pretrained(folder / family)
            tiny.save_tokenizer(folder / family)

    def one(self, seed: int) -> str | None:
        """Makes the change of a number.

        Returns:
            None, or what is wrong with the answer to it.
        """
        rng = random.Random(seed)
        family = FAMILIES[seed % len(FAMILIES)]
        source = self.folder / "changed"
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(self.folder / family, source)
        what = rng.choices(
            ["config", "tokenizer", "tensor", "files", "text", "option"], [40, 10, 25, 12, 6, 7]
        )[0]
        said = what
        try:
            with limited():
                if what == "text":
                    path, said = change_text(rng, self.text)
                    return self._text(source, path)
                if what == "option":
                    name = rng.choice(sorted(OPTIONS))
                    value = rng.choice(OPTIONS[name])
                    said = f"{name} {value[:20]!r}"
                    return self._command(source, [name, value])
                if what == "config":
                    said = change_json(rng, source / "config.json")
                elif what == "tokenizer":
                    file = rng.choice(["tokenizer.json", "tokenizer_config.json"])
                    said = change_json(rng, source / file)
                    return self._text(source, self.text)
                elif what == "tensor":
                    said = change_tensor(rng, source)
                else:
                    said = change_files(rng, source)
                wrong = self._weights(source, family, compress=rng.random() < 0.1)
                return wrong and f"{seed} {family}, {said}: {wrong}"
        except QmoeError as e:
            readable = what in ("config", "tensor", "files") and self._readable(source, family)
            self.outcomes["sentence, theirs reads it" if readable else "sentence"] += 1
            if readable:
                self.refused.append(f"{seed} {family}, {said}: {e}")
            return None if str(e).strip() else f"{family}, {said}: an empty sentence"
        except HangError as e:
            return f"{seed} {family}, {said}: {e}"
        except BaseException as e:
            where = traceback.extract_tb(e.__traceback__)[-1]
            text = (str(e).splitlines() or [""])[0][:160]
            return f"{seed} {family}, {said}: {type(e).__name__}: {text} ({where.name})"

    def _readable(self, source: Path, family: str) -> bool:
        try:
            with limited():
                return theirs(source, self.classes[family], IDS) is not None
        except HangError:
            return False

    def _weights(self, source: Path, family: str, compress: bool) -> str | None:
        if compress:
            return self._command(source, [])
        model = load_any(str(source), "float32", CPU)
        with building(str(source), what="run"):
            got = logits_of(model, IDS)
        expected = theirs(source, self.classes[family], IDS)
        self.outcomes["result" if expected is not None else "result, theirs fails"] += 1
        if expected is None:
            return None
        if got.shape == expected.shape and not torch.isfinite(expected).all():
            return None  # 1e38 among the weights: no numbers, here and there
        worst = float((got - expected).abs().max()) if got.shape == expected.shape else float("inf")
        if worst <= 1e-4 * max(1, float(expected.abs().max())):
            return None
        return f"logits differ by {worst} from transformers'"

    def _text(self, source: Path, text: Path) -> str | None:
        tokenizer = read_tokenizer(source, False)
        config = transformers.AutoConfig.from_pretrained(source)
        data = prepare(tokenizer, config, str(text), 128, 32, 0)
        check_tokens(data, tokenizer, 128)
        self.outcomes["result"] += 1
        return None

    def _command(self, source: Path, options: list[str]) -> str | None:
        out = self.folder / "out"
        for path in (out, out.with_name("out.partial")):
            shutil.rmtree(path, ignore_errors=True)
        line = ["compress", str(source), str(out), "--calib", str(self.text)]
        given = options[:1] + ["--method"] * ("--bits" in options or "--delta" in options)
        fixed = {"--method": "rtn", "--ctx": "32", "--calib-tokens": "64"}
        line += [x for k, v in fixed.items() if k not in given for x in (k, v)]
        done = CliRunner().invoke(qmoe_command, [*line, *options])
        if done.exit_code not in (0, 2) or (done.exit_code == 2) == out.exists():
            raise done.exception or RuntimeError(f"exit code {done.exit_code}")
        self.outcomes["sentence" if done.exit_code else "result"] += 1
        if done.exit_code == 0:
            qmoe.load(out)
        return None


def run(tiny: Any, folder: Path, seeds: range, tell: Callable[[str], object] = print) -> Mutator:
    """Makes all changes; tells of every failure."""
    mutator = Mutator(tiny, folder)
    for seed in seeds:
        failure = mutator.one(seed)
        if failure is not None:
            mutator.outcomes["failure"] += 1
            tell(failure)
    return mutator


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    import tiny

    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        seeds = range(options.first, options.first + options.count)
        done = run(tiny, Path(folder), seeds, lambda text: print(text, flush=True))
    print("\n".join(["refused, though transformers reads it:", *done.refused]))
    print(json.dumps({"changes": options.count, **done.outcomes}))
    return int(done.outcomes["failure"] > 0)


if __name__ == "__main__":
    sys.exit(main())
