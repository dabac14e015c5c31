"""The commands `qmoe serve`, `qmoe chat` and `qmoe exec`: parse, call, print."""

import sys
from typing import Any

import click

from qmoe.errors import QmoeError

_PASSED = {"ignore_unknown_options": True, "allow_interspersed_args": False}
_dtype = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
)
_device = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
)
_trust = click.option(
    "--trust-remote-code", is_flag=True, help="Run model code that the checkpoint brings along."
)


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("out")
@click.argument("extra", nargs=-1, type=click.UNPROCESSED)
@click.option("--host", default="localhost", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option(
    "--engine",
    type=click.Choice(["transformers", "vllm"]),
    default="transformers",
    show_default=True,
    help="vllm: where it is installed; EXTRA goes to it.",
)
@click.option("--no-batching", is_flag=True, help="One request at a time (transformers).")
@_device
@_dtype
@_trust
def serve(out: str, extra: tuple[str, ...], engine: str, **options: Any) -> None:
    """An OpenAI-compatible server for OUT, a compressed directory or a hub id; ctrl-C ends it."""
    from qmoe.engines.serve import serve as run
    from qmoe.engines.serve import serve_with_vllm

    place = options.pop("host"), options.pop("port")
    if engine == "vllm":
        if options["dtype"] != "auto":
            extra = ("--dtype", options["dtype"], *extra)
        if options["trust_remote_code"]:
            extra = ("--trust-remote-code", *extra)
        if options["device"] != "auto":
            raise QmoeError("vLLM chooses the device itself; leave --device")
        serve_with_vllm(out, *place, extra)
    if extra:
        raise QmoeError(f"unknown arguments {' '.join(extra)}; `qmoe serve --help` lists all")
    options["batching"] = not options.pop("no_batching")
    run(out, *place, **options)


@click.command()
@click.argument("out")
@click.option("--max-new-tokens", type=click.IntRange(1), default=512, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=None,
    help="0: always the likeliest token; default: as the model's generation_config says.",
)
@_device
@_dtype
@_trust
def chat(out: str, max_new_tokens: int, temperature: float | None, **options: Any) -> None:
    """A conversation with OUT in the terminal."""
    from qmoe.engines.chat import Chat, lines, model_and_tokenizer, talk

    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if temperature is not None:
        settings |= {"do_sample": temperature > 0}
        settings |= {"temperature": temperature} if temperature else {}
    model, tokenizer = model_and_tokenizer(out, **options)

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
