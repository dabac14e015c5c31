"""The command line: parse, call, print. No logic lives here, and no default: what is not given is
not passed on; the help texts quote the defaults of the functions that are called (tests/test_cli.py
compares them).

Every command's last line with `--json` is one JSON object. Errors of the input are one sentence on
stderr, exit code 2. Imports of torch and transformers happen inside the commands, so that `qmoe
--help` is instant.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from qmoe.engines.commands import add_to
from qmoe.errors import QmoeError
from qmoe.options import TEXTS, Bytes, rows, taken_rows
from qmoe.options import device as _device
from qmoe.options import given as _given
from qmoe.options import option as _option


class _Group(click.Group):
    """Turns every QmoeError, and what the system refuses, into one sentence and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except QmoeError as error:
            click.echo(f"qmoe: {error}", err=True)
            sys.exit(error.exit_code)
        except BrokenPipeError:  # whoever read our output has gone; click ends quietly
            raise
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            click.echo(f"qmoe: {place}{error.strerror or error}", err=True)
            sys.exit(QmoeError.exit_code)
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


_with_code = click.option(
    "--with-code",
    is_flag=True,
    help="Add a file through which trust_remote_code=True loads it without an `import qmoe`.",
)


def _say(text: str) -> None:
    click.echo(text, err=True)


def _show(result: dict[str, Any], as_json: bool, text: str) -> None:
    click.echo(json.dumps(result) if as_json else text)


@main.command()
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@_option(
    "--method", default="rd", type=click.Choice(["rd", "qmoe", "rtn", "gptq2", "gptq3", "gptq4"])
)
@_option("--bits", default="0.8", type=float, help="Stored bits per expert weight to hit (rd).")
@click.option(
    "--delta", type=float, default=None, help="The raw global step of rd, instead of --bits."
)
@_option(
    "--dense-bits",
    default="16",
    type=float,
    help="Stored bits per weight of attention, shared experts, embeddings and head, 3 to 8; 16: "
    "untouched.",
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
    help=f"Calibration text: {TEXTS} [default: a mix of prose, code, mathematics and dialogue "
    "that comes with qmoe].",
)
@_option("--calib-tokens", default="131072", type=click.IntRange(1))
@rows("calib-")
@_option(
    "--unseen",
    default="1",
    type=click.FloatRange(0, 16),
    help="Tokens that the model says by itself, per token of the text, so that what the text does "
    "not reach is kept too; 0: the text alone.",
)
@_option(
    "--ctx", default="the model's, at most 2048", type=click.IntRange(2), help="Window length."
)
@_option("--seed", default="0", type=click.IntRange(0, 2**63 - 1))
@_option(
    "--memory",
    default="8GiB",
    type=Bytes(),
    help="Memory of a process; activations beyond it go to mapped files in OUT.partial.",
)
@_option(
    "--source-cache",
    default="keep",
    type=click.Choice(["keep", "drop"]),
    help="Downloaded files of a hub id: keep them in the hub's cache, or drop each when no block "
    "ahead needs it, so that the disk never holds the whole source.",
)
@_device
@_trust
@click.option("--fresh", is_flag=True, help="Discard an unfinished earlier run on OUT.")
@_with_code
@_json
def compress(source: str, out: Path, as_json: bool, **options: Any) -> None:
    """Compress SOURCE, a directory or owner/name[@revision] of the hub, into OUT."""
    from qmoe.compression.pipeline import compress as run
    from qmoe.compression.settings import Settings
    from qmoe.system.processes import World

    given = _given(options)
    given["calib_rows"] = taken_rows(given, "calib_")
    with World.of_environment() as world:
        report = run(
            source,
            out,
            Settings(**given),
            sys.stderr.isatty(),
            world,
            _say,
        )
        if world.first:
            _show(report.as_dict(), as_json, report.text())


@main.command(name="eval")
@click.argument("model")
@click.option("--text", required=True, help=f"Evaluation text: {TEXTS}.")
@rows("")
@click.option(
    "--reference", default=None, help="Another checkpoint to compare with, usually the source."
)
@_option("--ctx", default="1024", type=click.IntRange(2), help="Window length.")
@_option("--tokens", default="all", type=click.IntRange(2), help="Use at most this many tokens.")
@_option("--dtype", default="float32", type=click.Choice(["float32", "bfloat16"]))
@_device
@_trust
@_json
def evaluate(model: str, as_json: bool, **options: Any) -> None:
    """Perplexity of MODEL (compressed or not) on a text, and its KL divergence from a reference."""
    from qmoe.measure.score import evaluate as run
    from qmoe.measure.score import score_text

    given = _given(options)
    read = taken_rows(given, "")
    score = run(model, progress=sys.stderr.isatty(), say=_say, rows=read, **given)
    _show(score.as_dict(), as_json, score_text(score))


@main.command()
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@_option(
    "--bits",
    default="0.4,0.6,0.8,1,1.5,2,3",
    help="Targets of rd, stored bits per expert weight.",
)
@_option(
    "--methods",
    default="rtn,qmoe,gptq2,gptq3,gptq4",
    help="Others to measure beside rd; '' for none.",
)
@click.option("--calib", default=None, help="Calibration text, see compress.")
@click.option("--text", required=True, help="Evaluation text, see eval.")
@_option("--calib-tokens", default="131072", type=click.IntRange(1))
@_option(
    "--ctx",
    default="1024",
    type=click.IntRange(2),
    help="Window length of calibration and evaluation.",
)
@_option("--tokens", default="all", type=click.IntRange(2), help="Evaluate at most so many tokens.")
@_option("--seed", default="0", type=click.IntRange(0, 2**63 - 1))
@_device
@click.option("--keep", is_flag=True, help="Keep the compressed checkpoints in OUT.")
@_json
def sweep(source: str, out: Path, as_json: bool, **options: Any) -> None:
    """Size against quality: a table and a picture of SOURCE compressed at several rates.

    Everything goes to OUT: points.jsonl, sweep.md, sweep.png. The same command resumes.
    """
    from qmoe.compression.settings import Settings
    from qmoe.measure import sweep as of
    from qmoe.measure.points import Points

    given = _given(options)
    lists: dict[str, Callable[[str], Any]] = {"bits": of.parse_bits, "methods": of.parse_methods}
    chosen: dict[str, Any] = {n: lists[n](given.pop(n)) for n in lists if n in given}
    measured = {k: given.pop(k) for k in ("text", "tokens", "ctx", "keep") if k in given}
    points = Points(
        source,
        out,
        progress=sys.stderr.isatty(),
        say=_say,
        **measured,
    )
    found = of.sweep(points, Settings(ctx=points.ctx, **given), **chosen)
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
@_with_code
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
@_option("--dtype", default="bfloat16", type=click.Choice(["bfloat16", "float16", "float32"]))
@_json
def export(out: Path, dest: Path, as_json: bool, **options: Any) -> None:
    """Write OUT back as a plain safetensors checkpoint that any runtime reads."""
    from qmoe.publish.export import export as run

    with _bar("export", "block") as advance:
        done = run(out, dest, progress=advance, **_given(options))
    text = f"{done.directory}: {done.stored_bytes / 2**20:.1f} MiB in {done.dtype}"
    _show(done.as_dict(), as_json, text)


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
    """How fast experts are packed for the kernels; --static: registers, spills and instructions per
    weight of every kernel, with a model of the H200. Timings: scripts/bench_gpu."""
    if not static:
        if experts is not None:
            raise QmoeError("--experts goes with --static; without it nothing is compiled")
        from qmoe.measure.kernels.packing import run as pack

        pack(as_json)
        return
    from qmoe.measure.kernels.static import run
    from qmoe.store.inspect import typical_experts

    run(as_json, None if experts is None else typical_experts(experts))


@bench.command(name="codec")
@_json
def bench_codec(as_json: bool) -> None:
    """Rate and speed of the entropy coder on one core, beside the ideals."""
    from qmoe.measure.codec_bench import run

    run(as_json)


add_to(main)
