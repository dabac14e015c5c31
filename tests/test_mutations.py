"""Single changes of what a user brings end in transformers' own result or in one sentence."""

import mutations
import pytest
import torch
import transformers

from qmoe.models.auto import building


def _run(tiny, folder, seeds):
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    failures = []
    try:
        done = mutations.run(tiny, folder, seeds, failures.append)
    finally:
        transformers.logging.set_verbosity(verbosity)
    assert failures == []
    assert done.outcomes["result"] > 0
    assert done.outcomes["sentence"] > 0


def test_a_sample_of_single_changes(tiny, tmp_path):
    _run(tiny, tmp_path, range(150))


@pytest.mark.slow
def test_five_thousand_single_changes(tiny, tmp_path):
    _run(tiny, tmp_path, range(150, 5150))


def test_a_traceback_a_hang_greed_and_another_result_are_seen(tiny, tmp_path, monkeypatch):
    mutator = mutations.Mutator(tiny, tmp_path)

    def outcome(load):
        monkeypatch.setattr(mutations, "load_any", load)
        monkeypatch.setattr(mutations, "change_json", lambda rng, path: "nothing")
        monkeypatch.setattr(mutations.random.Random, "choices", lambda *_, **__: ["config"])
        monkeypatch.setattr(mutations.random.Random, "random", lambda _: 1.0)
        return mutator.one(0)

    real = mutations.load_any
    assert outcome(real) is None

    def fails(*_):
        raise KeyError("x")

    def hangs(*_):
        raise mutations.HangError("no answer")

    def greedy(*_):
        torch.zeros(mutations.MEMORY)  # of four bytes each

    def greedy_in_a_sentence(*args):
        with building("m"):
            greedy()

    def another(*args):
        model = real(*args)
        model.lm_head.weight.data[20] += 1
        return model

    assert "KeyError" in outcome(fails)
    assert "no answer" in outcome(hangs)
    assert "allocate memory" in outcome(greedy)
    assert "over 2 GiB of memory: m/config.json" in outcome(greedy_in_a_sentence)
    assert "logits differ by" in outcome(another)
