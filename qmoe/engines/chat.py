"""``qmoe chat``: a conversation in the terminal, streaming, with tokens per second."""

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from qmoe.errors import QmoeError, UnsupportedModelError, reason

SETTINGS: dict[str, Any] = {"max_new_tokens": 512}  # of `generate`
HELP = (
    "/clear forgets the conversation, /exit or ctrl-D ends it, ctrl-C stops an answer; "
    "an empty line lets a text go on"
)


class Chat:
    """A loaded model and what was said so far.

    A tokenizer without a chat template makes it a continuation of text: what the user types is
    appended as it is.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: dict[str, Any]) -> None:
        """Args:
        model: a causal language model.
        tokenizer: its own.
        settings: for `generate`: max_new_tokens, temperature, ...
        """
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.template = bool(getattr(tokenizer, "chat_template", None))
        self.messages: list[dict[str, str]] = []
        self.text = ""

    def clear(self) -> None:
        """Forgets what was said."""
        self.messages, self.text = [], ""

    def _inputs(self, line: str) -> Any:
        """Tokens of the conversation with a line more, which is not said yet."""
        if not self.template:
            return self.tokenizer(self.text + line, return_tensors="pt")
        said = [*self.messages, {"role": "user", "content": line}]
        try:
            return self.tokenizer.apply_chat_template(
                said, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as e:  # whatever a model's template refuses
            raise QmoeError(f"the model's chat template does not take this: {reason(e)}") from e

    def _note(self, line: str, answer: str) -> None:
        if not self.template:
            self.text += line + answer
            return
        said = (("user", line), ("assistant", answer))
        self.messages += [{"role": role, "content": text} for role, text in said]

    def say(self, line: str, write: Callable[[str], object]) -> tuple[int, float, float]:
        """Answers.

        Args:
            line: what the user typed.
            write: gets the answer in pieces, as they come.

        Returns:
            Tokens of the answer, seconds to the first of them, seconds for the others.

        Raises:
            QmoeError: there is nothing to continue, or the conversation is longer than the model
                can read; the line is not said.
        """
        from transformers import TextStreamer

        inputs = self._inputs(line)
        ids = inputs["input_ids"]
        if ids.shape[1] == 0:
            raise QmoeError("there is no text to continue yet; write some")
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and ids.shape[1] >= limit:
            raise QmoeError(
                f"the conversation has {ids.shape[1]} tokens, the model reads {limit}; /clear it"
            )
        room = self.settings["max_new_tokens"]
        if limit is not None:
            room = min(room, limit - ids.shape[1])
        pieces: list[str] = []
        times = [time.perf_counter()]

        class Written(TextStreamer):
            def put(self, value: Any) -> None:
                if not self.next_tokens_are_prompt:
                    times.append(time.perf_counter())
                super().put(value)

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                pieces.append(text)
                write(text)

        streamer = Written(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            self.model.generate(
                **{k: v.to(self.model.device) for k, v in inputs.items() if k != "token_type_ids"},
                **(self.settings | {"max_new_tokens": room}),
                streamer=streamer,
            )
        finally:  # also what was said before ctrl-C
            self._note(line, "".join(pieces))
        count = len(times) - 1
        first = times[1] - times[0] if count else 0.0
        return count, first, times[-1] - times[1] if count else 0.0


def model_and_tokenizer(
    directory: str, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """A compressed model on a device, and its tokenizer.

    Args:
        directory: or id on the hub.
        device: as `pick_device` takes it.
        dtype: "auto" is the one it was saved in.
        trust_remote_code: run code that the checkpoint brings along.

    Raises:
        QmoeError: it is not sound, or has no tokenizer.
    """
    from qmoe.inference.load import load
    from qmoe.models.classes import read_tokenizer
    from qmoe.system.machine import pick_device

    where = pick_device(device)
    model = load(directory, dtype=dtype, device_map=where, trust_remote_code=trust_remote_code)
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{directory} is an encoder-decoder ({model.config.model_type}): it holds no "
            "conversation and continues no text"
        )
    return model, read_tokenizer(model.qmoe_directory, trust_remote_code)


def lines() -> Iterator[str]:
    """What the user types, until ctrl-D; of a pipe, its lines."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                print()  # the shell's prompt gets a line of its own
            return


def talk(chat: Chat, source: Iterator[str], write: Callable[[str], object]) -> None:
    """The loop: a line, its answer, how fast it came. ctrl-C ends an answer, not the conversation.

    Args:
        chat: with the model.
        source: what the user says.
        write: to the terminal.
    """
    if not chat.template:
        write("The tokenizer has no chat template: your text is continued, not answered.\n")
    for line in source:
        if line.strip() == "/exit":
            return
        if line.strip() == "/clear":
            chat.clear()
            continue
        if line.strip() == "/help":
            write(f"{HELP}\n")
            continue
        try:
            count, first, others = chat.say(line, write)
        except KeyboardInterrupt:
            write("\n[stopped]\n")
            continue
        except QmoeError as e:
            write(f"\n[{e}]\n")
            continue
        rate = f"{(count - 1) / others:.1f} tokens/s" if count > 1 and others > 0 else "-"
        write(f"\n[{count} tokens, first after {first:.2f} s, then {rate}]\n")
