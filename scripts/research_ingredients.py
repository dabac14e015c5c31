"""What each ingredient of the solver is worth on a model of several domains, at equal stored bits.

    python scripts/research_ingredients.py examples/tiny-domains --texts examples/text/domains
        --out DIR [--only "rd;damping 0.3"] [--bits 0.8] [--parts 2]

Every variant is quantized to within 3 % of the bits that are asked for, with three calibration
texts (parts of the mix, each with words of the model's own; the bundled mix has room for two); KL
of every domain is brought to these bits by the slope of docs/log-quant.md and divided by that of
`rd` with the same text. Measured runs lie in OUT/ingredients.jsonl. Ends in one JSON line.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from research_quant import CTX, Lab, Layer, LayerStep, stored_bits, windows
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from qmoe.calib.own_words import own_words
from qmoe.quantize import Problem, get_method
from qmoe.quantize.rd import Options, regular
from qmoe.system.text import markdown_table
from qmoe.types import QuantizedMatrix, grid_index, grid_scale

DOMAINS = ("en", "zh", "py")
DEV = 24  # windows of each domain
WINDOWS = 96  # of the text; as many of the model's own words
STEP = 6.2  # tried first
NEAR = 0.03  # of the bits: what is further away is run once more
POWER = -2.75  # of bits, in KL: see docs/log-quant.md
SLOPE = -0.87  # of log bits over log step, for the second step
Pairs = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Variant:
    """One way to quantize.

    Attributes:
        solver: options of rd.
        own: windows of the model's own words for each window of the text.
        text: windows of the text, times WINDOWS.
        layers: power of the gradient's weight of a layer.
        down: importance of down projections beside gate and up.
        order: "pivoted" or "descending" columns; "" as the solver has them.
        refit: step of the grid to which column scales return that are fitted by least squares after
            the integers stand; 0 leaves them.
        others: share of the error of experts already quantized that a down projection corrects.
        stream: share of the error of the residual stream that a down projection corrects.
        early: the residual stream is taken in front of the layer, not beside its experts.
    """

    solver: dict[str, float] = field(default_factory=dict)
    own: float = 1.0
    text: float = 1.0
    layers: float = 0.0
    down: float = 1.0
    order: str = ""
    refit: int = 0
    others: float = 0.0
    stream: float = 1.0
    early: bool = True


VARIANTS = {
    "rd": Variant(),
    "columns in natural order": Variant({"ascending": 0}),
    "columns descending": Variant(order="descending"),
    "columns pivoted, largest conditional variance last": Variant(order="pivoted"),
    "layers weighted by the gradient": Variant(layers=1.0),
    "down projections count half": Variant(down=0.5),
    "down projections count twice": Variant(down=2.0),
    "no drift correction": Variant({"drift": 0.0}),
    "half drift correction": Variant({"drift": 0.5}),
    "no layer Hessian": Variant({"shrinkage": 0.0}),
    "twice the layer Hessian": Variant({"shrinkage": 2.0}),
    "damping 0.03": Variant({"damping": 0.03}),
    "damping 0.3": Variant({"damping": 0.3}),
    "no own words": Variant(own=0.0),
    "half as many own words": Variant(own=0.5),
    "no own words, twice the text": Variant(own=0.0, text=2.0),
    "column scales by least squares": Variant(refit=16),
    "column scales by least squares, 1/16 octave": Variant(refit=4),
    "no error of the residual stream": Variant(stream=0.0),
    "error of the residual stream beside the experts": Variant(early=False),
    "and error of the experts before": Variant(others=1.0),
}


class Domains(Lab):
    """A model with calibration windows of one text, and dev windows of several domains."""

    def __init__(self, path: str, calib: Tensor, dev: dict[str, Tensor]) -> None:
        self.streams: list[Tensor] = []  # the original's, in front of every layer
        super().__init__(path, calib, torch.cat([*dev.values()]))
        self.domains = {name: len(ids) for name, ids in dev.items()}

    def enter(self, layer: Any, stream: Tensor) -> Layer:
        """As ever; the first walk is that of the original over the calibration windows."""
        if len(self.streams) < len(self.layers):
            self.streams.append(stream.clone())
        return super().enter(layer, stream)

    @torch.no_grad()
    def kl_by_domain(self, final: Tensor) -> dict[str, float]:
        """Nats a token."""
        out, at = {}, 0
        for name, count in self.domains.items():
            total = 0.0
            for _ in range(count):
                rows = slice(at, at + CTX - 1)
                p = self.model.lm_head(self.dev_final[rows]).log_softmax(-1)
                q = self.model.lm_head(final[rows]).log_softmax(-1)
                total += (p.exp() * (p - q)).sum().item()
                at += CTX
            out[name] = total / count / (CTX - 1)
        return out


class Step(LayerStep):
    """One layer's experts, with what a variant adds."""

    def __init__(self, variant: Variant, options: Options, error: Tensor, *of: Any) -> None:
        super().__init__(*of)
        self.variant, self.options, self.error = variant, options, error

    def _run(self, w: Tensor, pairs: Pairs, importance: float) -> Any:
        inner = w is self.down
        kept = list(pairs)
        products = [(x.T @ x, x0.T @ x) for x, x0 in kept]
        h, cross = (torch.stack(t) for t in zip(*products, strict=True))
        count = torch.tensor([len(t) for t, _ in self.tokens])
        problem = Problem(w, h, count, h.sum(0), int(count.sum()), cross, importance)
        if not inner or not (self.variant.others or self.variant.stream):
            return self._solved(problem), 0.0
        return self._one_by_one(problem, kept), 0.0

    def _solved(self, problem: Problem) -> list[QuantizedMatrix]:
        v = self.variant
        if v.order:
            problem, back = _reordered(problem, v.order)
            found = [
                _columns(m, b)
                for m, b in zip(self.method.solve(problem).matrices, back, strict=True)
            ]
        else:
            found = self.method.solve(problem).matrices
        if v.refit:
            found = _refitted(found, problem, self.options, v.refit)
        return found

    def _one_by_one(self, problem: Problem, pairs: list[tuple[Tensor, Tensor]]) -> list:
        """Each expert's target also makes good what the layer has lost already."""
        v = self.variant
        error = v.stream * self.error
        out = []
        for e, ((token, g), (x, x0)) in enumerate(zip(self.tokens, pairs, strict=True)):
            lost = error[token] * (g if v.others == 0 else torch.ones_like(g))
            one = slice(e, e + 1)
            part = replace(
                problem,
                hessian=problem.hessian[one],
                cross=problem.cross[one],
                tokens=problem.tokens[one],
                weight=problem.weight[one],
            )
            prior = regular(part, part.hessian.double(), self.options)[0]
            change = torch.linalg.solve(prior[0].float(), (lost.T @ x).T).T
            part = replace(part, weight=part.weight + change[None])
            out += self._solved(part)
            if v.others:
                y = F.linear(x0, problem.weight[e]) - F.linear(x, out[-1].dequantize())
                error = error.index_add(0, token, v.others * y)
        return out


def _reordered(problem: Problem, order: str) -> tuple[Problem, list[Tensor]]:
    """The problem with columns in another order, to be solved in their natural one."""
    h = problem.hessian
    if order == "descending":
        at = torch.argsort(h.diagonal(dim1=-2, dim2=-1), dim=1, descending=True)
    else:
        at = torch.stack([_pivots(x.double()) for x in h])
    pick = torch.arange(len(h))[:, None, None]
    both = (pick, at[:, :, None], at[:, None, :])
    # the layer's Hessian joins the experts', as the solver would, since each has its own order now
    prior = regular(problem, h.double(), replace(Options(1.0), damping=0.0))[0]
    added = prior - h
    return replace(
        problem,
        weight=problem.weight.gather(2, at[:, None, :].expand_as(problem.weight)),
        hessian=(h + added)[both],
        cross=(problem.cross + added)[both].float(),
        layer_hessian=None,
    ), [torch.argsort(a) for a in at]


def _pivots(h: Tensor) -> Tensor:
    """Order in which the column with the largest variance, given those behind it, comes last."""
    h = h + 0.1 * h.diagonal().mean() * torch.eye(len(h))
    left, out = h.clone(), []
    gone = torch.zeros(len(h), dtype=torch.bool)
    for _ in range(len(h)):
        d = left.diagonal().masked_fill(gone, -1)
        i = int(d.argmax())
        out.append(i)
        gone[i] = True
        left = left - torch.outer(left[:, i], left[i]) / left[i, i]
    return torch.tensor(out[::-1])


def _columns(m: QuantizedMatrix, order: Tensor) -> QuantizedMatrix:
    return QuantizedMatrix(m.codes[:, order].contiguous(), m.row_scale, m.col_scale[order])


def _refitted(
    found: list[QuantizedMatrix], problem: Problem, options: Options, step: int
) -> list[QuantizedMatrix]:
    """Column scales that minimize the damped error with the integers as they are."""
    h = regular(problem, problem.hessian.double(), options)[0]
    difference = options.drift * (problem.cross.double() - problem.hessian.double())
    out = []
    for m, w, hh, d in zip(found, problem.weight.double(), h, difference, strict=True):
        target = w + torch.linalg.solve(hh, (w @ d).T).T
        q = m.codes.double()
        gram = (q.T @ q) * hh
        right = ((target @ hh) * q).sum(0)
        used = gram.diagonal() > 0
        gram.diagonal().add_(1e-9 * gram.diagonal().mean())
        gram.diagonal()[~used] = 1.0
        fit = torch.linalg.solve(gram, right)
        old = grid_scale(m.col_scale).double()
        fit = torch.where(used, fit.clamp(old / 2, old * 2), old)
        out.append(QuantizedMatrix(m.codes, m.row_scale, grid_index(fit.float(), step)))
    return out


@torch.no_grad()
def quantized(lab: Domains, variant: Variant, delta: float) -> tuple[list, list]:
    """Weights and matrices of every layer."""
    method = get_method("rd", delta=delta, **variant.solver)
    options = Options(delta, **variant.solver)
    square = [g.square().sum(1).mean().item() for g in lab.fisher()] if variant.layers else []
    stream = lab.streams[0]
    weights, groups = [], []
    for n, layer in enumerate(lab.layers):
        importance = (square[n] / max(square)) ** variant.layers if square else 1.0
        into = lab.enter(layer, stream)
        error = torch.zeros(())
        if variant.stream or variant.others:
            error = _residual(lab, n) - into.residual
        if variant.stream and variant.early:
            error = lab.streams[n] - stream
        step = Step(
            variant, options, error, lab, method, into, lab.calib_hidden[n], *lab.weights[n]
        )
        groups += [matrices for matrices, _ in step.solve(importance, importance * variant.down)]
        weights.append((step.new_gate_up, step.new_down))
        stream = step.output()
    return weights, groups


def _residual(lab: Domains, n: int) -> Tensor:
    """The original residual stream beside the experts of a layer."""
    into: Layer = lab.enter(lab.layers[n], lab.streams[n])
    return into.residual


def measured(lab: Domains, variant: Variant, delta: float) -> tuple[float, dict[str, float]]:
    """Stored bits a weight, and KL of every domain."""
    weights, groups = quantized(lab, variant, delta)
    _, final = lab.stream(lab.dev, weights, keep=False)
    kl = lab.kl_by_domain(final)
    size = sum(m.codes.numel() for g in groups for m in g)
    return sum(stored_bits(g) for g in groups) / size, kl


def at_bits(found: float, kl: dict[str, float], bits: float) -> dict[str, float]:
    """KL at a number of bits near those that a run took."""
    return {d: k * (bits / found) ** POWER for d, k in kl.items()}


class Bench:
    """Measures variants, each once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.labs: dict[tuple, Domains] = {}
        args.out.mkdir(parents=True, exist_ok=True)
        self.file = args.out / "ingredients.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.known = {json.dumps(r["key"]): r for r in map(json.loads, lines)}

    def lab(self, part: int, variant: Variant) -> Domains:
        """The model with a text; one is kept."""
        key = (part, variant.own, variant.text)
        if key not in self.labs:
            self.labs.clear()
            count = round(WINDOWS * variant.text)
            calib = windows(self.tokenizer, self.args.texts / "calib_mix.txt", count, part * count)
            dev = {
                d: windows(self.tokenizer, self.args.texts / f"dev_{d}.txt", DEV) for d in DOMAINS
            }
            if variant.own:
                calib = torch.cat([calib, self._own(round(WINDOWS * variant.own), part)])
            self.labs[key] = Domains(self.args.model, calib, dev)
        return self.labs[key]

    def _own(self, count: int, seed: int) -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(self.args.model, dtype=torch.float32).eval()

        @torch.no_grad()
        def predict(batches: Any) -> Iterator[Tensor]:
            for b in batches:
                yield model(**b).logits

        size = model.config.vocab_size
        return own_words(predict, self.tokenizer, size, (count, CTX), seed)

    def run(self, name: str, part: int) -> dict[str, float]:
        """KL of a variant at the bits that are asked for."""
        variant, bits = VARIANTS[name], self.args.bits
        key = json.dumps([name, str(variant), part, bits])
        row = self.known.get(json.dumps(key))
        if row is None:
            lab = self.lab(part, variant)
            points = [measured(lab, variant, STEP)]
            if abs(points[0][0] / bits - 1) > NEAR:
                points.append(measured(lab, variant, STEP * (bits / points[0][0]) ** (1 / SLOPE)))
            row = {"key": key, "points": points, "kl": at_bits(*points[-1], bits)}
            with self.file.open("a") as f:
                f.write(json.dumps(row) + "\n")
            print(f"{name}, part {part}: {points}", file=sys.stderr, flush=True)
        return row["kl"]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("model")
    p.add_argument("--texts", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--only", type=lambda s: s.split(";"), default=list(VARIANTS))
    p.add_argument("--bits", type=float, default=0.8)
    p.add_argument("--parts", type=int, default=3)
    args = p.parse_args()
    bench = Bench(args)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in args.only}
    for part in range(args.parts):
        for name in args.only:
            found[name].append(bench.run(name, part))
    rows, out = [], []
    for name, runs in found.items():
        ratios = [
            mean(k[d] / k0[d] for d in DOMAINS) for k, k0 in zip(runs, found["rd"], strict=True)
        ]
        each = [mean(k[d] for k in runs) for d in DOMAINS]
        spread = stdev(ratios) if len(ratios) > 1 else 0.0
        out.append({"variant": name, "kl": each, "ratio": mean(ratios), "deviation": spread})
        rows.append([name, *(f"{k:.4f}" for k in each), f"{mean(ratios):.3f} ± {spread:.3f}"])
    print(markdown_table(["variant", *(f"KL {d}" for d in DOMAINS), "KL / rd"], rows))
    print(json.dumps({"bits": args.bits, "variants": out}))


if __name__ == "__main__":
    main()
