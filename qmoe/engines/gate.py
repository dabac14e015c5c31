"""What stands before transformers' server: requests that it would answer wrongly, in silence, or
die of.

Read from transformers 5.23: its continuous batching takes the sampling settings of the first
request for all, an empty prompt ends its worker for good, and stop strings, penalties, `n` and the
like are left out without a word. Here requests of one setting run side by side and another setting
waits for its turn; what cannot be done is refused in a sentence (400), as OpenAI's clients show it.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from qmoe.errors import QmoeError, reason

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

# path: where a request says how many tokens it wants, the first that it names counts
PATHS = {
    "/v1/completions": ("max_tokens",),
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/responses": ("max_output_tokens",),
}
_CHAT = ("/v1/chat/completions", "/v1/responses")
_DEFAULT_TOKENS = 1024  # as transformers' server
_SAMPLING = ("temperature", "top_p", "seed", "generation_config")  # of a batch, not of a request
# field: the values that mean nothing; another one changes the answer and is not followed
_NOT_FOLLOWED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
}
_NOT_IN_BATCHES: dict[str, tuple[Any, ...]] = {
    "stop": ([], ""),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
}


@dataclass(frozen=True)
class Served:
    """What is served, as far as requests are checked against it.

    Attributes:
        name: for clients.
        tokenizer: the model's.
        most_tokens: that a conversation may have, None where nobody knows.
        batching: whether requests share a batch.
        alive: whether the batch still runs.
        restart: ends the batch; the next request starts another.
    """

    name: str
    tokenizer: Any
    most_tokens: int | None
    batching: bool
    alive: Callable[[], bool]
    restart: Callable[[], None]


class Gate:
    """An ASGI application around transformers'."""

    def __init__(self, app: Any, served: Served) -> None:
        self.app, self.served = app, served
        self.turns = Turns(served.alive, served.restart)

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Passes a request on if it is sound, when it is its turn."""
        path = scope.get("path", "")
        if scope["type"] != "http" or scope["method"] != "POST" or path not in PATHS:
            await self.app(scope, receive, send)
            return
        raw = await _body(receive)
        try:
            body = json.loads(raw)
            if isinstance(body, dict):
                body = self.checked(path, body)
                raw = json.dumps(body).encode()
        except ValueError:
            body = None  # no JSON: the server says so
        except QmoeError as e:
            await _refuse(send, str(e))
            return
        headers = [h for h in scope["headers"] if h[0] != b"content-length"]
        scope = scope | {"headers": [*headers, (b"content-length", str(len(raw)).encode())]}
        again = _replayed(raw, receive)
        try:
            if not self.served.batching or not isinstance(body, dict):
                await self.app(scope, again, send)
                return
            async with self.turns.of(json.dumps([body.get(key) for key in _SAMPLING])):
                await self.app(scope, again, send)
        except asyncio.CancelledError:  # ctrl-C while a stream is open: no traceback of that
            return

    def checked(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The request with a number of tokens that fits.

        Raises:
            QmoeError: it asks for something that would not be done.
        """
        served = self.served
        if path in _CHAT and not getattr(served.tokenizer, "chat_template", None):
            raise QmoeError(
                f"{served.name} has no chat template: it continues text and holds no "
                "conversations; use /v1/completions"
            )
        not_followed = _NOT_FOLLOWED | (_NOT_IN_BATCHES if served.batching else {})
        for name, harmless in not_followed.items():
            if (value := body.get(name)) is not None and value not in harmless:
                way = "--no-batching or " if name in _NOT_IN_BATCHES else ""
                raise QmoeError(
                    f"{name}={value!r} is not supported by this server; leave it out, or start "
                    f"`qmoe serve` with {way}--engine vllm"
                )
        names = PATHS[path]
        given = next((n for n in names if body.get(n) is not None), None)
        wanted = _DEFAULT_TOKENS if given is None else body[given]
        if not isinstance(wanted, int) or wanted < 1:
            raise QmoeError(f"{given} is {wanted!r}; it must be a number of tokens from 1 on")
        length = self._length(path, body)
        if served.most_tokens is None or length is None:
            return body
        room = served.most_tokens - length
        if room < (1 if given is None else wanted):
            more = "" if given is None else f" and {given} is {wanted}"
            raise QmoeError(
                f"the prompt has {length} tokens{more}; {served.name} takes {served.most_tokens}"
            )
        return body | {given or names[0]: min(wanted, room)}

    def _length(self, path: str, body: dict[str, Any]) -> int | None:
        """Tokens of a prompt; None where the server itself must see to it."""
        tokenizer = self.served.tokenizer
        if path == "/v1/completions":
            prompt = body.get("prompt")
            if not isinstance(prompt, str):
                raise QmoeError("prompt must be one text; send several as requests of their own")
            if length := len(tokenizer(prompt)["input_ids"]):
                return length
            raise QmoeError("prompt is empty; there is nothing to continue")
        messages = body.get("messages")
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages
        ):
            return None
        try:
            ids = tokenizer.apply_chat_template(
                messages, tools=body.get("tools"), add_generation_prompt=True, return_dict=True
            )
        except Exception as e:  # whatever a model's template refuses
            raise QmoeError(f"the chat template does not take these messages: {reason(e)}") from e
        return len(ids["input_ids"])


class Turns:
    """Lets holders of one key in together, and those of another only when all have left; in the
    order in which they came."""

    def __init__(self, alive: Callable[[], bool], change: Callable[[], None]) -> None:
        """Args:
        alive: False calls `change` for the same key too.
        change: called between two keys, when nobody is in; may take a while.
        """
        self.alive, self.change = alive, change
        self.key: str | None = None
        self.inside = 0
        self.order, self.empty = asyncio.Lock(), asyncio.Event()

    @asynccontextmanager
    async def of(self, key: str) -> AsyncIterator[None]:
        """Waits for the turn of a key."""
        async with self.order:
            while self.inside and (key != self.key or not self.alive()):
                self.empty.clear()
                await self.empty.wait()
            if self.key is not None and (key != self.key or not self.alive()):
                await asyncio.to_thread(self.change)
            self.key = key
            self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1
            if not self.inside:
                self.empty.set()


async def _body(receive: Receive) -> bytes:
    raw: bytes = b""
    while True:
        message = await receive()
        raw += message.get("body", b"")
        if not message.get("more_body"):
            return raw


def _replayed(raw: bytes, receive: Receive) -> Receive:
    """Gives a body that was read already, then what comes: that the client has gone."""
    left = [{"type": "http.request", "body": raw, "more_body": False}]

    async def again() -> dict[str, Any]:
        return left.pop() if left else await receive()

    return again


async def _refuse(send: Send, sentence: str) -> None:
    error = {"message": sentence, "type": "invalid_request_error", "code": 400}
    data = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": data})
