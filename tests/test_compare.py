"""scripts/compare: where rd meets a peer, names in GGUF files, the picture. Peers themselves run
only where they are installed."""

import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture(scope="module")
def compare():
    sys.path.insert(0, str(SCRIPTS))
    loader = SourceFileLoader("qmoe_scripts_compare", str(SCRIPTS / "compare"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module
    loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPTS))


def _points(compare):
    def point(name, family, bits, kl, whole=None):
        texts = {"a": kl * 0.5, "b": kl * 1.5}
        return compare.Point(name, family, bits, whole, texts, {}, {})

    ours = [point(f"rd {b}", "rd", b, 0.08 * b**-2.0) for b in (0.5, 1.0, 2.0)]
    return [*ours, point("iq2_xxs", "llama.cpp", 2.0, 0.08 * 0.8**-2.0)]


def test_bits_at_equal_kl_lie_on_the_line_between_two_points(compare):
    ours = [(b, 0.08 * b**-2.0) for b in (0.5, 1.0, 2.0)]
    assert compare.at_kl(ours, 0.08 * 0.7**-2.0) == pytest.approx(0.7)
    assert compare.at_kl(ours, 1.0) is None  # worse than anything measured
    assert compare.at_kl(ours, 1e-6) is None


def test_a_row_says_what_rd_needs_and_what_is_aimed_at(compare):
    rows = compare.rows(_points(compare), whole=False)
    peer = next(r for r in rows if r["format"] == "iq2_xxs")
    assert peer["ratio"] == pytest.approx(0.4)
    assert peer["at_most"] == 0.40
    text = compare.table(rows, ["a", "b"], "experts")
    assert "| iq2_xxs: 2.000 |" in text
    assert "| 0.800 | 0.40 | 0.40 |" in text


def test_every_tensor_of_qwen3_moe_has_a_place_in_a_gguf_file(compare, tiny, tmp_path):
    gguf = sys.modules["compare_gguf"]
    tiny.save("qwen3_moe", tmp_path / "m")
    weights = tiny.load_all(tmp_path / "m")
    names = {gguf.gguf_name(n) for n in weights}
    assert "blk.0.ffn_down_exps.weight" in names
    assert "token_embd.weight" in names
    with pytest.raises(ValueError, match="no place"):
        gguf.gguf_name("model.layers.0.mlp.shared_expert.up_proj.weight")


def test_experts_alone_are_replaced_and_counted(compare, tiny, tmp_path):
    peers = sys.modules["compare_peers"]
    tiny.save("qwen3_moe", tmp_path / "m")
    weights = tiny.load_all(tmp_path / "m")
    before = {n: w.clone() for n, w in weights.items()}
    bits = peers.experts_only(weights, lambda name, w: (w * 0, 3.0 * w.numel()))
    assert bits == pytest.approx(3.0)
    for name, w in weights.items():
        expert = ".experts." in name
        assert torch.equal(w, before[name] * (0 if expert else 1)), name


def test_no_library_is_no_error(compare, tmp_path):
    assert sys.modules["compare_peers"].find_llama(tmp_path) is None


def test_the_picture_is_readable_on_any_ground(compare, tmp_path):
    pytest.importorskip("matplotlib")
    import compare_plot

    compare_plot.draw(_points(compare), tmp_path / "a.svg")
    compare_plot.draw(_points(compare), tmp_path / "b.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()  # the same points, the same file
    assert "iq2_xxs" in text
    assert "#ffffff" not in text
    assert "#000000" not in text
    for colour in (compare_plot.INK, *compare_plot.COLOURS.values()):
        light = sum(
            c * int(colour[i : i + 2], 16) / 255 for c, i in ((0.3, 1), (0.59, 3), (0.11, 5))
        )
        assert 0.25 < light < 0.75, colour  # apart from white and from black
