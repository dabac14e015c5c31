"""The commands `qmoe serve`, `qmoe chat` and `qmoe exec`: parse, call, print."""

import sys
from typing import Any

import click

from qmoe.errors import QmoeError
from qmoe.options import device, given, option

_PASSED = {"ignore_unknown_options": True, "allow_interspersed_args": False}
_DTYPES = click.Choice(["auto", "float32", "bfloat16", "float16"])


_dtype = option("--dtype", default="auto", type=_DTYPES)
_trust = click.option(
    "--trust-remote-code", is_flag=True, help="Run model code that the checkpoint brings along."
)


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("out")
@click.argument("extra", nargs=-1, type=click.UNPROCESSED)
@option("--host", default="localhost")
@option("--port", default="8000", type=click.IntRange(0, 65535), help="0: any free one.")
@option(
    "--engine",
    default="transformers",
    type=click.Choice(["transformers", "vllm"]),
    help="vllm: where it is installed; EXTRA goes to it.",
)
@click.option("--no-batching", is_flag=True, help="One request at a time (transformers).")
@device
@_dtype
@_trust
def serve(out: str, extra: tuple[str, ...], engine: str | None, **options: Any) -> None:
    """An OpenAI-compatible server for OUT, a compressed directory or a hub id; ctrl-C ends it."""
    from qmoe.engines import serve as servers

    chosen = given(options)
    if engine == "vllm":
        servers.serve_with_vllm(out, extra, **chosen)
    if extra:
        raise QmoeError(f"unknown arguments {' '.join(extra)}; `qmoe serve --help` lists all")
    servers.serve(out, **chosen)


@click.command()
@click.argument("out")
@option("--max-new-tokens", default="512", type=click.IntRange(1))
@option(
    "--temperature",
    default="as the model's generation_config says",
    type=click.FloatRange(0),
    help="0: always the likeliest token.",
)
@device
@_dtype
@_trust
def chat(out: str, max_new_tokens: int | None, temperature: float | None, **options: Any) -> None:
    """A conversation with OUT in the terminal."""
    from qmoe.engines.chat import Chat, lines, model_and_tokenizer, settings, talk

    model, tokenizer = model_and_tokenizer(out, **given(options))

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    talk(Chat(model, tokenizer, settings(max_new_tokens, temperature)), lines(), write)


@click.command(name="exec", context_settings=_PASSED)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(command: tuple[str, ...]) -> None:
    """Run a Python script, -m MODULE or console command (lm_eval, …) that then loads compressed
    models like any other, without an `import qmoe`."""
    from qmoe.engines.run import run

    run(command)


def add_to(group: click.Group) -> None:
    """Puts the commands under `group`."""
    for command in (serve, chat, exec_):
        group.add_command(command)
