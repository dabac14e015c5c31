"""Single changes of what a user brings, and what comes of them: the result of transformers' own
reading of the same input, or one sentence. tests/test_mutations.py and `python tests/mutations.py`
run them; a traceback, a hang, memory that no tensor asks for, or another result is a failure.
"""

import argparse
import json
import random
import re
import resource
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
from changes import OPTIONS, change_files, change_json, change_tensor, change_text
from click.testing import CliRunner

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
MEMORY = 2 * 2**30  # bytes that a single change may take: its model has less than a megabyte
HUNGRY = re.compile(r"bad_alloc|MemoryError|allocate (memory|[\d.]+ \wi?B)")  # what libraries say
ALONE = "result, theirs fails"
CPU = torch.device("cpu")
IDS = torch.randint(16, 50, (2, 12), generator=torch.Generator().manual_seed(5))


class HangError(BaseException):
    """A change took longer than `SECONDS`."""


@contextmanager
def limited() -> Iterator[None]:
    """Raises `HangError` inside after `SECONDS`, and gives no more than `MEMORY`, beyond which the
    kernel might end the whole run."""

    def ring(*_: object) -> None:
        raise HangError(f"no answer in {SECONDS} s")

    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, hard))
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of a batch of tokens."""
    extra = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    out: torch.Tensor = model(input_ids=ids, **extra, use_cache=False).logits
    return out


def theirs(source: Path, cls: Any, ids: torch.Tensor) -> torch.Tensor | None:
    """Logits of transformers' own reading; None if it fails, or fills in random numbers."""
    try:
        if re.search(r"(layers|experts|depth)\W+10{6,}\b", _text(source / "config.json")):
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
        self.alone: list[str] = []  # what we read and transformers does not
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
                    path, said, fine = change_text(rng, self.text)
                    wrong = self._text(source, path, 10**6)
                    return wrong if fine else f"{seed} {said}: read as if it were text"
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
                alone = self.outcomes[ALONE]
                wrong = self._weights(source, family, compress=rng.random() < 0.1)
                if self.outcomes[ALONE] > alone:
                    self.alone.append(f"{seed} {family}, {said}")
                return wrong and f"{seed} {family}, {said}: {wrong}"
        except QmoeError as e:
            if HUNGRY.search(str(e)):
                return f"{seed} {family}, {said}: over {MEMORY >> 30} GiB of memory: {e}"
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
        self.outcomes["result" if expected is not None else ALONE] += 1
        if expected is None:
            return None
        if got.shape == expected.shape and not torch.isfinite(expected).all():
            return None  # 1e38 among the weights: no numbers, here and there
        worst = float((got - expected).abs().max()) if got.shape == expected.shape else float("inf")
        if worst <= 1e-4 * max(1, float(expected.abs().max())):
            return None
        return f"logits differ by {worst} from transformers'"

    def _text(self, source: Path, text: Path, tokens: int = 128) -> str | None:
        tokenizer = read_tokenizer(source, False)
        config = transformers.AutoConfig.from_pretrained(source)
        data = prepare(tokenizer, config, str(text), tokens, 32, 0)
        check_tokens(data, tokenizer, 128)
        self.outcomes["result"] += 1
        return None

    def _command(self, source: Path, options: list[str]) -> str | None:
        out = self.folder / "out"
        for path in (out, out.with_name("out.partial")):
            shutil.rmtree(path, ignore_errors=True)
        line = ["compress", str(source), str(out), "--calib", str(self.text)]
        of_rd = {"--bits", "--delta", "--model-bits"} & set(options)
        given = options[:1] + ["--method"] * bool(of_rd)
        fixed = {"--method": "rtn", "--ctx": "32", "--calib-tokens": "64"}
        line += [x for k, v in fixed.items() if k not in given for x in (k, v)]
        done = CliRunner().invoke(qmoe_command, [*line, *options])
        if done.exit_code not in (0, 2) or (done.exit_code == 2) == out.exists():
            raise done.exception or RuntimeError(f"exit code {done.exit_code}")
        if HUNGRY.search(done.output):
            raise MemoryError(done.output)
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
    print("\n".join(["read, though transformers fails:", *done.alone]))
    print(json.dumps({"changes": options.count, **done.outcomes}))
    return int(done.outcomes["failure"] > 0)


if __name__ == "__main__":
    sys.exit(main())
