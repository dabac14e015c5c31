"""fairseq's tokenizer: GPT-2's byte-level BPE, its tokens renumbered by a dictionary file.

Ids 0 to 3 are ``<s> <pad> </s> <unk>``; line n of dict.txt, "GPT-2 id, space, count", is id 4 + n.
fairseq turns line ends into ``</s>`` before it tokenizes, and so does the tokenizer made here; as
fairseq's task does, it puts one of the special tokens before every text.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from qmoe.errors import SourceError

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
PAIRS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))


def read_tokenizer(directory: Path, size: int, begin: str) -> Any | None:
    """The tokenizer of a fairseq model, or None if its files are not in the directory.

    Args:
        directory: holds dict.txt and GPT-2's vocabulary and merges.
        size: rows of the model's embedding.
        begin: the special token before every text.

    Raises:
        SourceError: dict.txt has more tokens than the embedding or names ids that GPT-2 has not.
    """
    pair = next((p for p in PAIRS if all((directory / f).is_file() for f in p)), None)
    if pair is None or not (directory / "dict.txt").is_file():
        return None
    gpt2 = {i: t for t, i in json.loads((directory / pair[0]).read_text("utf-8")).items()}
    vocabulary = {t: i for i, t in enumerate(SPECIAL)}
    for line in (directory / "dict.txt").read_text("utf-8").splitlines():
        key = line.rsplit(" ", 1)[0]
        token = gpt2.get(int(key)) if key.isdigit() else key  # others are padding: madeupword0000
        if token is None:
            raise SourceError(
                f"{directory / 'dict.txt'}: GPT-2 has no token {key}; the files differ"
            )
        vocabulary[token] = len(vocabulary)
    if len(vocabulary) > size:
        raise SourceError(
            f"{directory / 'dict.txt'} has {len(vocabulary) - 4} tokens, but the model's embedding "
            f"only {size} rows; it belongs to another model"
        )
    lines = (directory / pair[1]).read_text("utf-8").splitlines()
    merges = [
        (a, b) for a, b in (x.split(" ") for x in lines if x and not x.startswith("#version"))
    ]
    known = [m for m in merges if {*m, "".join(m)} <= set(vocabulary)]
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=known, unk_token="<unk>"))
    core.normalizer = normalizers.Replace("\n", "</s>")
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A {begin} $B:1",
        special_tokens=[(begin, vocabulary[begin])],
    )
    # normalized: line ends become this token only after the normalizer
    core.add_special_tokens([AddedToken("</s>", normalized=True, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=begin,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
