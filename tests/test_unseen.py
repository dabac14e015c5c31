"""What the calibration text does not reach: the model's own words, the least use, the report."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tokenizers.processors import TemplateProcessing

from qmoe.calib.own_words import LENGTH, own_words
from qmoe.compression.pipeline import compress, open_job
from qmoe.compression.report import advice
from qmoe.compression.settings import Settings
from qmoe.compression.unseen import of, with_own_words
from qmoe.inference.load import load
from qmoe.measure.score import load_any
from qmoe.models.classes import read_tokenizer
from qmoe.publish.export import export
from qmoe.store.coverage import coverage, expert_bits
from qmoe.store.inspect import inspect
from qmoe.store.reader import Container
from qmoe.system.processes import World


@pytest.fixture(scope="module")
def two_halves(tiny, tmp_path_factory):
    """A mixtral whose router goes by the token: tokens below the middle of the vocabulary use
    experts 0 and 1 alone, the others 2 and 3; and a text of the first half.
    """
    folder = tmp_path_factory.mktemp("halves")
    source = tiny.save("mixtral", folder / "source", num_hidden_layers=2)
    tiny.save_tokenizer(source)
    model = load_any(str(source), "float32", torch.device("cpu"))
    half = 33  # of tokens 16 to 49, which are the words of the tokenizer
    with torch.no_grad():
        table = model.model.embed_tokens.weight
        table[:, 0] = 3.0
        table[half:, 0] = -3.0
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.weight[:, 0] = torch.tensor([4.0, 3.0, -3.0, -4.0])
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(layer.self_attn, name).weight.mul_(0.1)
            layer.mlp.experts.gate_up_proj.mul_(8)  # so that losing an expert is seen
            layer.mlp.experts.down_proj.mul_(8)
            layer.mlp.experts.down_proj[:, 0] = 0  # what routes stays as it is
    model.save_pretrained(source)
    tokenizer = read_tokenizer(source, False)
    words = [tokenizer.decode([i]) for i in range(16, half)]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(words), (2500,), generator=generator).tolist()
    text = folder / "half.txt"
    text.write_text(" ".join(words[i] for i in drawn), "utf-8")
    return source, str(text), half


def _settings(text, **options):
    return Settings(
        calib=text, calib_tokens=2048, ctx=64, **({"delta": 1.0} | options), device="cpu"
    )


def _divergence(source, out, low, high):
    """KL of a compressed model on random tokens of a part of the vocabulary."""
    ids = torch.randint(low, high, (16, 32), generator=torch.Generator().manual_seed(1))
    before, after = load_any(str(source), "float32", torch.device("cpu")), load(out)
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits.log_softmax(-1) for m in (before, after))
    return F.kl_div(q, p, reduction="sum", log_target=True).item() / ids.numel()


@pytest.mark.parametrize("start", [[], [3, 0]])
def test_own_words_are_drawn_by_the_models_probabilities(start):
    tokenizer = type("T", (), {"all_special_ids": [0, 3], "__len__": lambda self: 9})()
    calls = []

    def predict(batches):  # the token after n is n + 1 or n + 2, as 3 to 1; padding ids are likely
        calls.append([tuple(b["input_ids"].shape) for b in batches])
        for batch in batches:
            ids = batch["input_ids"]
            assert ids[:, : len(start)].tolist() == [start] * len(ids)
            p = torch.full((*ids.shape, 12), 1e-9)
            p[..., 9:] = 1.0
            p[..., 0] = 1.0
            for step, share in ((1, 0.3), (2, 0.1)):
                p.scatter_(2, ((ids + step) % 9)[..., None], share)
            yield p.log()

    whole = own_words(predict, tokenizer, 12, (256, 64 + len(start)), seed=1, start=start)
    assert whole.shape == (256, 64 + len(start))
    assert whole[:, : len(start)].tolist() == [start] * 256
    said = whole[:, len(start) :]
    assert not torch.isin(said, torch.tensor([0, 3, 9, 10, 11])).any()
    assert [shapes[0][1] - len(start) for shapes in calls] == list(range(1, LENGTH))
    pieces = said.reshape(-1, LENGTH)
    counts = torch.bincount(pieces[:, 0], minlength=9)[[1, 2, 4, 5, 6, 7, 8]]
    assert counts.max() - counts.min() <= 1  # every token begins as often as the next
    after_four = pieces[:, 1][pieces[:, 0] == 4]
    assert abs((after_four == 5).float().mean() - 0.75) < 0.05
    again = [own_words(predict, tokenizer, 12, whole.shape, s, start) for s in (1, 2)]
    assert torch.equal(whole, again[0])
    assert not torch.equal(whole, again[1])


@pytest.mark.parametrize("bos", ["auto", "off", "on"])
def test_own_words_begin_as_the_windows_of_the_text_do(two_halves, tmp_path, bos):
    source, text, _ = two_halves
    begun = tmp_path / "source"
    shutil.copytree(source, begun)
    tokenizer = read_tokenizer(begun, False)
    first = tokenizer.convert_ids_to_tokens(1)
    core = tokenizer.backend_tokenizer
    core.post_processor = TemplateProcessing(single=f"{first} $A", special_tokens=[(first, 1)])
    tokenizer.bos_token = first
    tokenizer.save_pretrained(begun)
    job = open_job(str(begun), tmp_path / "x", _settings(text, calib_rows={"bos": bos}), World())
    job.streamed.load_rest()
    said = torch.tensor(of(with_own_words(job, None)))
    assert said.shape[1] == job.batches[0]["input_ids"].shape[1]
    ours = {int(t) for t in job.batches[0]["input_ids"][:, 0]}
    assert (set(said[:, 0].tolist()) == {1}) == (ours == {1}) == (bos != "off")
    assert not (said[:, 1:] == 1).any()


def test_own_words_do_not_depend_on_threads(two_halves, tmp_path):
    source, text, _ = two_halves
    said = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        job = open_job(str(source), tmp_path / "x", _settings(text), World())
        job.streamed.load_rest()
        spoken = with_own_words(job, None)
        said.append(of(spoken))
        assert len(spoken.batches) == len(job.batches)
        assert spoken.own == job.own > 0
        torch.set_num_threads(1)
    assert said[0] == said[1]
    assert len(said[0]) == 2048 // 64
    half = two_halves[2]
    share = (torch.tensor(said[0]) >= half).float().mean()
    assert 0.3 < share < 0.7  # of the half that the text never shows


def _weights(tiny, out):
    export(out, out.with_name(f"{out.name}-dense"), "float32")
    return tiny.load_all(out.with_name(f"{out.name}-dense"))


def test_unseen_experts_survive_calibration_on_half_of_the_vocabulary(two_halves, tmp_path, tiny):
    source, text, half = two_halves
    sentences = []
    kl = {}
    bits = {}
    for unseen, least in ((0.0, 0.0), (0.0, 0.2), (1.0, 0.05)):
        out = tmp_path / f"{unseen:g}-{least:g}"
        settings = _settings(text, unseen=unseen, solver_options={"least_use": least})
        said = []
        compress(str(source), out, settings, say=said.append)
        sentences.append(" ".join(said))
        kl[unseen, least] = _divergence(source, out, half, 50)
        bits[unseen, least] = expert_bits(Container.open(out), "model.layers.0.mlp.experts")
    assert kl[1.0, 0.05] < 0.2 * kl[0.0, 0.0]
    assert kl[0.0, 0.2] < 0.2 * kl[0.0, 0.0]
    lifted = bits[0.0, 0.2] - bits[0.0, 0.0]
    assert lifted[2:].min() > 1
    # experts with evidence share tables with those that were lifted, and nothing else: at 6 bits
    # one more or one less of the tables is worth 0.2
    assert lifted[:2].abs().max() < 0.2
    plain, least = (_weights(tiny, tmp_path / name) for name in ("0-0", "0-0.2"))
    for name in ("w1", "w3", "w2"):
        path = f"model.layers.0.block_sparse_moe.experts.0.{name}.weight"
        error = float((least[path] - plain[path]).norm() / plain[path].norm())
        # the Hessian of down is shrunk towards that of all experts together
        assert error <= (0 if name != "w2" else 0.01)
    for sentence in sentences:
        assert "of 8 experts got less than 0.1 of an equal share" in sentence
    assert "will suffer" in sentences[0]
    assert "own words" in sentences[2]


def test_report_and_inspect_name_experts_below_the_floor(two_halves, tmp_path):
    source, text, _ = two_halves
    out = tmp_path / "out"
    options = {"least_use": 0.0, "shrinkage": 0.0}
    settings = _settings(text, delta=400.0, unseen=0.0, solver_options=options)
    report = compress(str(source), out, settings)
    container = Container.open(out)
    covered = coverage(container)
    found = inspect(out)
    total = sum(
        float(expert_bits(container, path).sum()) / layout.experts * layout.weights
        for path, layout in container.modules.items()
    )
    names = 2 * len(container.modules)  # entries in the headers of the files, counted as stored
    assert 0 <= found.expert_bytes - total / 8 < 150 * names
    tokens = container.manifest["report"]["modules"]["model.layers.0.mlp.experts"]["tokens"]
    assert sum(tokens) == 2 * 2048
    assert tokens[2:] == [0, 0]
    by_hand = sum(
        n * b
        for path in container.modules
        for n, b in zip(
            container.manifest["report"]["modules"][path]["tokens"],
            expert_bits(container, path).tolist(),
            strict=True,
        )
    ) / (len(container.modules) * sum(tokens))
    assert found.bits_as_read == pytest.approx(by_hand)
    few = {
        p: (expert_bits(container, p) < 0.1).nonzero().flatten().tolist() for p in container.modules
    }
    assert covered.below_floor == {p: e for p, e in few.items() if e}
    assert found.as_dict()["below_floor"] == covered.below_floor
    json.dumps(found.as_dict(layers=True)), json.dumps(report.as_dict())
    assert "as read" in found.text()
    assert "as read" in report.text()
    made = replace(found, below_floor_text=tuple(covered.floor_text()))
    for line in covered.floor_text():
        assert line in made.text()
        assert line in report.text()


def test_floor_text_names_modules_and_counts_the_rest():
    from qmoe.store.coverage import Coverage

    below = {f"layers.{i}": [i, i + 1] for i in range(9)}
    (line,) = Coverage(None, below, None, None, None).floor_text(most=2)
    assert line == (
        "18 experts have less than 0.1 bit: layers.0 (0, 1), layers.1 (1, 2) and of 7 more modules"
    )
    assert Coverage(None, {}, None, None, None).floor_text() == []


def test_advice_is_silent_where_all_experts_are_reached():
    sizes = SimpleNamespace(experts_scant=0, experts=64, bits_per_weight=0.8)
    assert advice(Settings(calib="x"), sizes) == ""
    assert advice(Settings(calib="x"), replace_scant(sizes, None)) == ""


def replace_scant(sizes, value):
    return SimpleNamespace(**{**vars(sizes), "experts_scant": value})
