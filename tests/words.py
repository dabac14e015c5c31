"""A tokenizer of words, and files of rows, for tests of calibration text."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(200)]
CHAT = "{% for m in messages %}w0 {{ m.content }} w1 {% endfor %}"


def make_tokenizer():
    """Knows `WORDS`, and what span corruption needs."""
    special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(12))]
    vocab = {w: i for i, w in enumerate([*special, *WORDS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def number(tokenizer, *words):
    return tokenizer.convert_tokens_to_ids(list(words))


def jsonl(path, *rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path
