"""The self-check of the kernels on a device, and what happens where it fails."""

import re
import warnings

import pytest
import torch
from ptx.launch import executed

import qmoe
from qmoe.inference import cuda, experts
from qmoe.kernels import launch, selfcheck
from qmoe.measure.kernels.sample import packed, sample_matrix
from qmoe.measure.kernels.sample import rough_matrix as matrix


def wrong(text):
    """A kernel that takes its inputs 1.5 times, or adds the scales of rows instead of multiplying
    with them.
    """
    scale = "0f3C800000"  # 1/64
    if scale in text:
        return text.replace(scale, "0f3CC00000")
    changed = re.sub(r"\bmul(\.rn)?\.f32\b", "add.f32", text)
    assert changed != text
    return changed


@pytest.mark.parametrize(
    ("broken", "trusted", "says"),
    [
        ((), True, []),
        (("matvec_shared",), True, ["a product is wrong.*the plain loop runs instead"]),
        (
            ("matvec_shared", "matvec"),
            False,
            ["the plain loop runs instead", "a product is wrong.*decoded on the CPU"],
        ),
        (("decode_shared",), True, ["decoded weights differ.*the plain loop runs instead"]),
        (("grouped_dot",), False, ["a product is wrong", "a product is wrong"]),
        (
            ("decode_shared", "decode_active"),
            False,
            ["decoded weights differ", "decoded weights differ"],
        ),
    ],
)
def test_self_check(broken, trusted, says, monkeypatch):
    monkeypatch.setattr(selfcheck, "_verdicts", {})
    monkeypatch.setattr(launch, "_chosen", {})
    p = packed([sample_matrix(70, 90, 0.8)], 2)
    with executed(90) as session, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for name in broken:
            session.change[name] = wrong
        assert selfcheck.trusted(p) == trusted
        assert selfcheck.trusted(p) == trusted  # once a device
    texts = [str(w.message) for w in seen if "qmoe's kernels fail" in str(w.message)]
    assert len(texts) == len(says)
    for text, pattern in zip(texts, says, strict=True):
        assert re.search(pattern, text)
    chosen = launch._chosen.get(torch.device("cpu"))
    assert (chosen is not None and not chosen.shared) == (trusted and bool(broken))


def test_an_exception_is_a_failed_check(monkeypatch):
    monkeypatch.setattr(selfcheck, "_verdicts", {})

    def fails(p, plan):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(selfcheck, "problem", fails)
    with (
        launch.forced(launch.PORTABLE),
        pytest.warns(UserWarning, match="RuntimeError: PassManager::run failed"),
    ):
        assert not selfcheck.trusted(packed([matrix(4, 4)]))


def test_untrusted_kernels_leave_the_work_to_the_cpu(compressed, monkeypatch):
    model = qmoe.load(compressed[0], dtype=torch.float32)
    ids = torch.randint(3, 120, (1, 6))
    want = model(input_ids=ids, use_cache=False).logits
    monkeypatch.setattr(cuda, "trusted", lambda p: False)
    monkeypatch.setitem(experts.BACKENDS, "cpu", cuda.run_kernels)
    assert cuda.prepare(model, ("cpu",)) == 0
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, want)
