"""The model's own words beside the calibration text: how many, and how the model is made to say
them (see `qmoe.calib.own_words`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from qmoe.calib.batches import begun, split_batches
from qmoe.calib.outputs import Resident
from qmoe.calib.own_words import own_words
from qmoe.compression.blocks import BlockLoop
from qmoe.compression.job import Job
from qmoe.compression.settings import Settings
from qmoe.errors import QmoeError
from qmoe.models.downloads import begin_walk, leave
from qmoe.system.processes import World

BATCH_TOKENS = 4096  # tokens of one forward; fixed, since it decides the rounding of sums


def with_room(job: Job) -> Job:
    """The job with batches of zeros behind its own, as many as the model's own words will fill:
    for rd alone, other methods learn from the text as their authors have it; encoder-decoder
    models say none.

    Raises:
        QmoeError: it was asked for where it cannot be.
    """
    decides = job.settings.unseen not in (0, Settings.unseen)
    if job.streamed.config.is_encoder_decoder and decides:
        raise QmoeError("--unseen: an encoder-decoder model says no text of its own; leave it out")
    if job.settings.method != "rd" or job.streamed.config.is_encoder_decoder:
        return job
    text = [batch["input_ids"] for batch in job.batches]
    count = round(job.settings.unseen * sum(len(ids) for ids in text))
    return _behind(job, torch.zeros(count, text[0].shape[1], dtype=torch.long))


def with_own_words(job: Job, known: Sequence[Sequence[int]] | None) -> Job:
    """The job with the batches filled for which `with_room` made room.

    Args:
        job: its model with everything outside its blocks resident. All processes call this in step.
        known: the words where an earlier run of the same job found them.
    """
    if not job.own:
        return job
    if known is None:
        known = job.world.share(lambda: _say(job).tolist(), "the model's own words")
    return _behind(job, torch.tensor(known))


def of(job: Job) -> list[list[int]]:
    """The windows that the model says, for the journal of the run."""
    own = job.batches[len(job.batches) - job.own :]
    return [row for batch in own for row in batch["input_ids"].tolist()]


def _behind(job: Job, ids: Tensor) -> Job:
    text = list(job.batches[: len(job.batches) - job.own])
    if not len(ids):
        return replace(job, batches=text, own=0)
    own = split_batches({"input_ids": ids}, BATCH_TOKENS)
    return replace(job, batches=[*text, *own], own=len(own))


def _say(job: Job) -> Tensor:
    own = [batch["input_ids"] for batch in job.batches[len(job.batches) - job.own :]]
    bos = job.settings.calib_rows.get("bos", "auto")
    start = begun(job.batches[0]["input_ids"], job.tokenizer, bos)
    windows = (sum(len(ids) for ids in own), own[0].shape[1])
    head = job.streamed.model.get_output_embeddings()
    text = job.streamed.config.get_text_config()
    vocabulary = int(text.vocab_size if head is None else head.weight.shape[0])
    alone = replace(job, world=World())
    predict = partial(_predict, alone)
    return own_words(predict, job.tokenizer, vocabulary, windows, job.settings.seed, start)


def _predict(job: Job, batches: Sequence[dict[str, Tensor]]) -> Iterator[Tensor]:
    """Logits of every batch, by a walk through all blocks. The same walk as a compression's, also
    where the model would fit in memory: its sums do not depend on the number of threads.
    """
    streamed, blocks = job.streamed, list(job.streamed.blocks())
    outputs = Resident(job.store)
    loop = BlockLoop(replace(job, batches=batches, own=0), [outputs], unchanged=True)
    begin_walk(streamed, blocks)
    hidden = not job.progress
    title = f"own words, token {batches[0]['input_ids'].shape[1] + 1}"
    for i, block in enumerate(tqdm(blocks, desc=title, unit="block", disable=hidden)):
        loop.block(block, None, blocks[i + 1 : i + 2])
        leave(streamed, block)
    yield from loop.whole_walk().logits()
    outputs.drop()
