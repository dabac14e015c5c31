"""The command line: parse, call, print. No logic lives here.

Every command's last line with `--json` is one JSON object. Errors of the input are one sentence on
stderr, exit code 2. Imports of torch and transformers happen inside the commands, so that `qmoe
--help` is instant.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import click

from qmoe.errors import QmoeError


class _Bytes(click.ParamType[int]):
    """A size such as 8GiB, 500MB or a plain number of bytes."""

    name = "size"
    _units: ClassVar = {
        "": 1,
        "b": 1,
        "kb": 10**3,
        "mb": 10**6,
        "gb": 10**9,
        "kib": 2**10,
        "mib": 2**20,
    }
    _units |= {"gib": 2**30, "tib": 2**40, "tb": 10**12}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(value))
        if not found or found.group(2).lower() not in self._units:
            self.fail(
                f"{value!r} is not a size; write 8GiB, 500MB or a number of bytes", param, ctx
            )
        return int(float(found.group(1)) * self._units[found.group(2).lower()])


class _Group(click.Group):
    """Turns every QmoeError into one sentence and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except QmoeError as error:
            click.echo(f"qmoe: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("qmoe: interrupted", err=True)
            sys.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="qmoe")
def main() -> None:
    """Mixture-of-experts models below one bit per expert weight, run without unpacking."""


_json = click.option(
    "--json", "as_json", is_flag=True, help="The last line of the output is one JSON object."
)
_trust = click.option(
    "--trust-remote-code", is_flag=True, help="Run model code that the source brings along."
)
_device = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
)


def _show(result: dict[str, Any], as_json: bool, text: str) -> None:
    click.echo(json.dumps(result) if as_json else text)


@main.command()
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--method",
    type=click.Choice(["rd", "qmoe", "rtn", "gptq2", "gptq3", "gptq4"]),
    default="rd",
    show_default=True,
)
@click.option(
    "--bits",
    type=float,
    default=None,
    help="Stored bits per expert weight to hit (rd); default 0.8.",
)
@click.option(
    "--delta", type=float, default=None, help="The raw global step of rd, instead of --bits."
)
@click.option(
    "--dense-bits",
    type=float,
    default=16,
    show_default=True,
    help="Stored bits per weight of attention, shared experts, embeddings and head together, 3 to "
    "8, divided among them by one slope; 16: untouched.",
)
@click.option(
    "--model-bits",
    type=float,
    default=None,
    help="Stored bits per weight of the whole file (rd), instead of --bits and --dense-bits.",
)
@click.option(
    "--calib",
    "calib",
    type=str,
    default=None,
    help="Calibration text: .txt, .jsonl, .parquet or a datasets name; default: a mix of prose, "
    "code, mathematics and dialogue that comes with qmoe.",
)
@click.option("--calib-tokens", type=click.IntRange(1), default=131072, show_default=True)
@click.option(
    "--calib-column",
    default="text",
    show_default=True,
    help="Column of the text in jsonl, parquet or a dataset.",
)
@click.option(
    "--calib-pack",
    is_flag=True,
    help="Join documents by the end-of-text token; else no window straddles two.",
)
@click.option(
    "--calib-chat",
    is_flag=True,
    help="Apply the chat template to each row's messages (or its text); packs.",
)
@click.option(
    "--ctx",
    type=click.IntRange(2),
    default=None,
    help="Window length; default: the model's, at most 2048.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--memory",
    type=_Bytes(),
    default="8GiB",
    show_default=True,
    help="Memory of a process; activations beyond it go to mapped files in OUT.partial.",
)
@click.option(
    "--source-cache",
    type=click.Choice(["keep", "drop"]),
    default="keep",
    show_default=True,
    help="Downloaded files of a hub id: keep them in the hub's cache, or drop each when no block "
    "ahead needs it, so that the disk never holds the whole source.",
)
@_device
@_trust
@click.option("--fresh", is_flag=True, help="Discard an unfinished earlier run on OUT.")
@_json
def compress(source: str, out: Path, as_json: bool, **options: Any) -> None:
    """Compress SOURCE, a directory or owner/name[@revision] of the hub, into OUT."""
    from qmoe.compression.pipeline import Settings, compress_checkpoint
    from qmoe.system.processes import World

    free = all(options[name] is None for name in ("bits", "delta", "model_bits"))
    if options["method"] == "rd" and free:
        options["bits"] = 0.8
    rows = {name: options.pop(f"calib_{name}") for name in ("column", "pack", "chat")}
    options["calib_rows"] = {k: v for k, v in rows.items() if v not in (False, "text")}
    with World.of_environment() as world:
        report = compress_checkpoint(
            source,
            out,
            Settings(**options),
            sys.stderr.isatty(),
            world,
            lambda text: click.echo(text, err=True),
        )
        if world.first:
            _show(report.as_dict(), as_json, report.text())


@main.command(name="eval")
@click.argument("model")
@click.option(
    "--text", required=True, help="Evaluation text: .txt, .jsonl, .parquet or a datasets name."
)
@click.option(
    "--reference", default=None, help="Another checkpoint to compare with, usually the source."
)
@click.option("--ctx", type=click.IntRange(2), default=1024, show_default=True)
@click.option(
    "--tokens", type=click.IntRange(2), default=None, help="Use at most this many tokens."
)
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True
)
@_device
@_trust
@_json
def evaluate(model: str, as_json: bool, **options: Any) -> None:
    """Perplexity of MODEL (compressed or not) on a text, and its KL divergence from a reference."""
    from qmoe.measure.score import score_checkpoint, score_text

    score = score_checkpoint(model, progress=sys.stderr.isatty(), **options)
    _show(score.as_dict(), as_json, score_text(score))


@main.command()
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--bits",
    default="0.4,0.6,0.8,1,1.5,2,3",
    show_default=True,
    help="Targets of rd, stored bits per expert weight.",
)
@click.option(
    "--methods",
    default="rtn,qmoe,gptq2,gptq3,gptq4",
    show_default=True,
    help="Others to measure beside rd; '' for none.",
)
@click.option("--calib", default=None, help="Calibration text, see compress.")
@click.option("--text", required=True, help="Evaluation text, see eval.")
@click.option("--calib-tokens", type=click.IntRange(1), default=131072, show_default=True)
@click.option(
    "--ctx",
    type=click.IntRange(2),
    default=1024,
    show_default=True,
    help="Window length of calibration and evaluation.",
)
@click.option(
    "--tokens", type=click.IntRange(2), default=None, help="Evaluate at most this many tokens."
)
@click.option("--seed", type=int, default=0, show_default=True)
@_device
@click.option("--keep", is_flag=True, help="Keep the compressed checkpoints in OUT.")
@_json
def sweep(source: str, out: Path, bits: str, methods: str, as_json: bool, **options: Any) -> None:
    """Size against quality: a table and a picture of SOURCE compressed at several rates.

    Everything goes to OUT: points.jsonl, sweep.md, sweep.png. The same command resumes.
    """
    from qmoe.measure.sweep import parse_bits, parse_methods, run

    targets, others = parse_bits(bits), parse_methods(methods)

    def say(text: str) -> None:
        click.echo(text, err=True)

    found = run(source, out, targets, others, progress=sys.stderr.isatty(), say=say, **options)
    _show(found.as_dict(), as_json, found.text())


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--layers", is_flag=True, help="A row for every layer and projection.")
@_json
def inspect(out: Path, layers: bool, as_json: bool) -> None:
    """Sizes, bits per weight and expert coverage of a compressed checkpoint; decodes nothing."""
    from qmoe.store.inspect import inspect as run

    found = run(out)
    _show(found.as_dict(layers), as_json, found.text(layers))


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@_json
def verify(out: Path, as_json: bool) -> None:
    """Check every checksum, then decode every stream; exit code 0 only if all is sound."""
    from qmoe.publish.verify import verify as run

    with _bar("verify", "B") as advance:
        found = run(out, advance)
    text = f"{out}: sound ({found.files} files, {found.matrices} matrices decoded)"
    _show(asdict(found), as_json, text)


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--revision", default=None, help="Branch to push to; made if there is none.")
@click.option("--message", default=None, help="Commit message.")
@click.option(
    "--eval", "score", type=click.Path(), default=None, help="Output of `qmoe eval --json`, shown."
)
@click.option("--base", default=None, help="Hub id of the original, if the manifest has none.")
@click.option("--license", "license_id", default=None, help="License id of the original, shown.")
@_json
def push(out: Path, repo: str, as_json: bool, **options: Any) -> None:
    """Verify OUT, then upload it to REPO (owner/name) of the hub with a model card."""
    from qmoe.publish.push import push as run

    with _bar("verify", "B") as advance:
        done = run(out, repo, progress=advance, **options)
    _show(done.as_dict(), as_json, f"{done.url}: {len(done.files)} files")


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("dest", type=click.Path(path_type=Path))
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True
)
@_json
def export(out: Path, dest: Path, dtype: str, as_json: bool) -> None:
    """Write OUT back as a plain safetensors checkpoint that any runtime reads."""
    from qmoe.publish.export import export as run

    with _bar("export", "block") as advance:
        run(out, dest, dtype, advance)
    size = sum(p.stat().st_size for p in dest.glob("*.safetensors"))
    found = {"dest": str(dest), "dtype": dtype, "bytes": size}
    _show(found, as_json, f"{dest}: {size / 2**20:.1f} MiB in {dtype}")


@contextmanager
def _bar(name: str, unit: str) -> Iterator[Callable[[int], object]]:
    """A progress bar on a terminal; yields what advances it."""
    from tqdm import tqdm

    with tqdm(desc=name, unit=unit, unit_scale=unit == "B", disable=not sys.stderr.isatty()) as bar:
        yield bar.update


@main.command(name="import")
@click.argument("project", type=click.Choice(["openmoe", "fairseq", "megablocks"]))
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path))
@_json
def import_(project: str, src: Path, dst: Path, as_json: bool) -> None:
    """Rewrite a training project's checkpoint SRC as a transformers directory DST."""
    from qmoe.models.importers import IMPORTERS
    from qmoe.models.importers.report import as_dict, text

    done = IMPORTERS[project](src, dst)
    _show(as_dict(done), as_json, text(done))


@main.group()
def bench() -> None:
    """The numbers of docs/results.md, reproducible."""


@bench.command(name="kernels")
@click.option("--static", is_flag=True, help="Compile for five targets and count; needs no GPU.")
@click.option(
    "--experts",
    type=click.Path(path_type=Path),
    help="Take the experts of a compressed checkpoint as a model.",
)
@_json
def bench_kernels(static: bool, experts: Path | None, as_json: bool) -> None:
    """Registers, spills and instructions per weight of every kernel, with a model of the H200."""
    if not static:
        raise QmoeError("timings need a GPU: run scripts/bench_gpu there; here pass --static")
    from qmoe.measure.kernels.static import run
    from qmoe.store.inspect import typical_experts

    run(as_json, None if experts is None else typical_experts(experts))


@bench.command(name="codec")
@_json
def bench_codec(as_json: bool) -> None:
    """Rate and speed of the entropy coder on one core, beside the ideals."""
    from qmoe.measure.codec_bench import run

    run(as_json)
