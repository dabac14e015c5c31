"""The commands `qmoe serve`, `qmoe chat` and `qmoe exec`: parse, call, print."""

import sys
from typing import Any

import click

from qmoe.errors import QmoeError
from qmoe.options import device, given, option

_PASSED = {"ignore_unknown_options": True, "allow_interspersed_args": False}
_dtype = option(
    "--dtype", default="auto", type=click.Choice(["auto", "float32", "bfloat16", "float16"])
)
_trust = click.option(
    "--trust-remote-code", is_flag=True, help="Run model code that the checkpoint brings along."
)


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("out")
@click.argument("extra", nargs=-1, type=click.UNPROCESSED)
@option("--host", default="localhost")
@option("--port", default="8000", type=click.IntRange(0, 65535))
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
def serve(out: str, extra: tuple[str, ...], **options: Any) -> None:
    """An OpenAI-compatible server for OUT, a compressed directory or a hub id; ctrl-C ends it."""
    from qmoe.engines.serve import serve as run
    from qmoe.engines.serve import serve_with_vllm

    chosen = given(options)
    if chosen.pop("engine", "") == "vllm":
        if "device" in chosen:
            raise QmoeError("vLLM chooses the device itself; leave --device")
        if "dtype" in chosen:
            extra = ("--dtype", chosen["dtype"], *extra)
        if "trust_remote_code" in chosen:
            extra = ("--trust-remote-code", *extra)
        place = {name: chosen[name] for name in ("host", "port") if name in chosen}
        serve_with_vllm(out, extra=extra, **place)
    if extra:
        raise QmoeError(f"unknown arguments {' '.join(extra)}; `qmoe serve --help` lists all")
    run(out, batching=not chosen.pop("no_batching", False), **chosen)


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
def chat(out: str, temperature: float | None, **options: Any) -> None:
    """A conversation with OUT in the terminal."""
    from qmoe.engines.chat import SETTINGS, Chat, lines, model_and_tokenizer, talk

    chosen = given(options)
    settings = SETTINGS | {k: chosen.pop(k) for k in SETTINGS if k in chosen}
    if temperature is not None:
        settings |= {"do_sample": temperature > 0}
        settings |= {"temperature": temperature} if temperature else {}
    model, tokenizer = model_and_tokenizer(out, **chosen)

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    talk(Chat(model, tokenizer, settings), lines(), write)


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
