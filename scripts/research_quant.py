"""Measure solvers in memory: perplexity and KL of a small MoE against bits per expert weight.

    python scripts/research_quant.py examples/tiny-mixtral --run qmoe --run "rd delta=8 drift=0.5"

Every run quantizes the model layer by layer on the activations of the already quantized layers, as
`qmoe compress` does, but writes nothing. One line of JSON per run. Handles models with fused
experts (`mlp.experts.gate_up_proj`) that fit in memory.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from research_tune import Weights, distill, loss_gradients
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from qmoe.codec import encode_group
from qmoe.quantize import Method, Problem, get_method
from qmoe.types import QuantizedMatrix

CTX = 256
CHUNK = 32  # windows in one forward
TEXT = Path(__file__).resolve().parent.parent / "examples" / "text"


@dataclass
class Layer:
    """What a decoder layer's experts receive and what is added to their output."""

    residual: Tensor  # [tokens, width]
    hidden: Tensor  # [tokens, width]
    index: Tensor  # [tokens, top_k]
    gate: Tensor  # [tokens, top_k]

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Tokens that the expert sees and their routing weights [n, 1]."""
        token, slot = torch.where(self.index == expert)
        return token, self.gate[token, slot, None]


class Lab:
    """A model, its original activations, and the loop that quantizes it."""

    def __init__(self, path: str, calib: Tensor, dev: Tensor) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.dev, self.calib = dev, calib
        self.layers = self.model.model.layers
        self.weights = [
            (layer.mlp.experts.gate_up_proj.data, layer.mlp.experts.down_proj.data)
            for layer in self.layers
        ]
        self.act = self.layers[0].mlp.experts.act_fn
        self.calib_hidden, self.calib_final = self.stream(calib, self.weights)
        self.gradients: list[Tensor] | None = None
        _, self.dev_final = self.stream(dev, self.weights, keep=False)
        self.nll, _ = self.score(self.dev_final)

    @torch.no_grad()
    def enter(self, layer: Any, stream: Tensor) -> Layer:
        """Attention and router of a layer; the experts themselves are left out."""
        calls: list[tuple[Tensor, Tensor, Tensor]] = []

        def stub(hidden: Tensor, index: Tensor, gate: Tensor) -> Tensor:
            calls.append((hidden, index, gate))
            return torch.zeros_like(hidden)

        forward, layer.mlp.experts.forward = layer.mlp.experts.forward, stub
        position = torch.arange(CTX)[None]
        residual = []
        for x in stream.view(-1, CTX, stream.shape[-1]).split(CHUNK):
            embedding = self.model.model.rotary_emb(x, position)
            y = layer(x, attention_mask=None, position_ids=position, position_embeddings=embedding)
            residual.append((y if isinstance(y, Tensor) else y[0]).flatten(0, 1))
        layer.mlp.experts.forward = forward
        hidden, index, gate = (torch.cat(t) for t in zip(*calls, strict=True))
        return Layer(torch.cat(residual), hidden, index, gate)

    @torch.no_grad()
    def stream(
        self, data: Tensor, weights: Weights, keep: bool = True
    ) -> tuple[list[Tensor], Tensor]:
        """Inputs of every layer's experts (if `keep`) and the final normed hidden states."""
        x = self.model.model.embed_tokens(data).flatten(0, 1)
        kept = []
        for layer, (gate_up, down) in zip(self.layers, weights, strict=True):
            into = self.enter(layer, x)
            if keep:
                kept.append(into.hidden)
            x = into.residual
            for e in range(len(down)):
                token, g = into.of(e)
                y = F.linear(self.activate(into.hidden[token], gate_up[e]), down[e])
                x.index_add_(0, token, y * g)
        return kept, self.model.model.norm(x)

    def activate(self, x: Tensor, gate_up: Tensor) -> Tensor:
        a, b = F.linear(x, gate_up).chunk(2, -1)
        return self.act(a) * b

    @torch.no_grad()
    def score(self, final: Tensor) -> tuple[float, float]:
        """Mean next-token loss on dev and KL(original || model), in nats."""
        nll = kl = 0.0
        targets = self.dev.roll(-1, 1).flatten()
        valid = torch.ones_like(self.dev, dtype=torch.bool)
        valid[:, -1] = False
        valid = valid.flatten()
        for x, x0, y, ok in zip(
            *(t.split(4096) for t in (final, self.dev_final, targets, valid)), strict=True
        ):
            q = self.model.lm_head(x).log_softmax(-1)
            nll -= (q.gather(1, y[:, None])[:, 0] * ok).sum().item()
            if final is not self.dev_final:
                p = self.model.lm_head(x0).log_softmax(-1)
                kl += ((p.exp() * (p - q)).sum(1) * ok).sum().item()
        return nll / valid.sum().item(), kl / valid.sum().item()

    def fisher(self) -> list[Tensor]:
        """Loss gradients at the experts' outputs on the calibration text, one tensor per layer."""
        if self.gradients is None:
            self.gradients = loss_gradients(self.model, self.weights, self.calib)
        return self.gradients

    @torch.no_grad()
    def quantize(
        self, method: Method, layers: float = 0.0, down: float = 1.0
    ) -> tuple[Weights, list[list[QuantizedMatrix]], float]:
        """Quantized weights, the matrices of every group (layer x projection), solver seconds.

        Args:
            method: the solver.
            layers: power of the mean squared loss gradient as the layer's importance.
            down: importance of the down projections relative to gate and up.
        """
        square = [g.square().sum(1).mean().item() for g in self.fisher()] if layers else []
        stream = self.model.model.embed_tokens(self.calib).flatten(0, 1)
        weights, groups, seconds = [], [], 0.0
        for n, layer in enumerate(self.layers):
            importance = (square[n] / max(square)) ** layers if layers else 1.0
            into = self.enter(layer, stream)
            step = LayerStep(self, method, into, self.calib_hidden[n], *self.weights[n])
            for matrices, time_taken in step.solve(importance, importance * down):
                groups.append(matrices)
                seconds += time_taken
            weights.append((step.new_gate_up, step.new_down))
            stream = step.output()
        return weights, groups, seconds


class LayerStep:
    """One layer's experts while they are quantized."""

    def __init__(
        self,
        lab: Lab,
        method: Method,
        into: Layer,
        hidden0: Tensor,
        gate_up: Tensor,
        down: Tensor,
    ) -> None:
        self.lab, self.method, self.into, self.hidden0 = lab, method, into, hidden0
        self.gate_up, self.down = gate_up, down
        self.tokens = [into.of(e) for e in range(len(down))]
        self.new_gate_up, self.new_down = gate_up, down

    def solve(
        self, gate_up_importance: float, down_importance: float
    ) -> Iterator[tuple[list[QuantizedMatrix], float]]:
        """Both projections, one after the other: matrices and solver seconds."""
        matrices, seconds = self._run(self.gate_up, self._inputs(), gate_up_importance)
        self.new_gate_up = torch.stack([m.dequantize() for m in matrices])
        yield matrices, seconds
        matrices, seconds = self._run(self.down, self._activations(), down_importance)
        self.new_down = torch.stack([m.dequantize() for m in matrices])
        yield matrices, seconds

    def output(self) -> Tensor:
        """Output of the layer with the quantized experts; the residual is reused."""
        for e, (token, g) in enumerate(self.tokens):
            active = self.lab.activate(self.into.hidden[token], self.new_gate_up[e])
            y = F.linear(active, self.new_down[e]) * g
            self.into.residual.index_add_(0, token, y)
        return self.into.residual

    def _inputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Weighted inputs of every expert, in the quantized and in the original model."""
        for token, g in self.tokens:
            weight = g if self.method.weighted else torch.ones_like(g)
            yield self.into.hidden[token] * weight, self.hidden0[token] * weight

    def _activations(self) -> Iterator[tuple[Tensor, Tensor]]:
        for e, (token, g) in enumerate(self.tokens):
            weight = g if self.method.weighted else torch.ones_like(g)
            x = self.lab.activate(self.into.hidden[token], self.new_gate_up[e])
            x0 = self.lab.activate(self.hidden0[token], self.gate_up[e])
            yield x * weight, x0 * weight

    def _run(
        self, w: Tensor, pairs: Iterator[tuple[Tensor, Tensor]], importance: float
    ) -> tuple[list[QuantizedMatrix], float]:
        products = [(x.T @ x, x0.T @ x) for x, x0 in pairs]
        h, cross = (torch.stack(t) for t in zip(*products, strict=True))
        count = torch.tensor([len(t) for t, _ in self.tokens])
        problem = Problem(w, h, count, h.sum(0), int(count.sum()), cross, importance)
        start = time.perf_counter()
        solution = self.method.solve(problem)
        return solution.matrices, time.perf_counter() - start


def entropy(values: Tensor, contexts: Tensor | None = None) -> float:
    """Bits of all integers under one histogram per context; both in [-2048, 2047]."""
    key = values.flatten().long() + 2048
    if contexts is not None:
        key += (contexts.flatten().long() + 2048) * 4096
    counts = torch.bincount(key - key.min()).double()
    if contexts is None:
        counts = counts[None]
    else:
        counts = F.pad(counts, (int(key.min()) % 4096, 0))
        counts = F.pad(counts, (0, -len(counts) % 4096)).view(-1, 4096)
    total = counts.sum(1, keepdim=True).clamp_min(1)
    return -(counts * (counts / total).clamp_min(1e-300).log2()).sum().item()


def ideal_bits(group: list[QuantizedMatrix]) -> tuple[float, float]:
    """Code and side bits of a group: one histogram per context (row class + column class).

    Classes are half octaves of the mean |q|; all side data is counted: classes, scales, and 7 bits
    a row for the length of its stream.
    """
    codes = torch.stack([m.codes for m in group])
    size = codes.abs().float()
    row, col = size.mean(2), size.mean(1)
    row = row / row.mean(1, keepdim=True).clamp_min(1e-6)
    row = (2 * row.clamp_min(2**-4).log2()).round()
    col = (2 * col.clamp_min(2**-6).log2()).round()
    context = (row[:, :, None] + col[:, None]).clamp(-12, 8)
    side = 7.0 * row.numel() + entropy(row) + entropy(col)
    for name in ("row_scale", "col_scale", "row_scale_neg"):
        if getattr(group[0], name) is not None:
            side += entropy(torch.stack([getattr(m, name) for m in group]))
    return entropy(codes, context), side


def stored_bits(group: list[QuantizedMatrix]) -> float:
    """Every byte that the codec writes for a group, times 8."""
    encoded = encode_group(group)
    return 8.0 * (encoded.tables.numel() + sum(m.numel() for m in encoded.matrices))


HARNESS = ("layers", "down")


def report(lab: Lab, text: str) -> dict[str, Any]:
    """One run: "method key=value ..."; keys of HARNESS and "tune_..." are not the method's."""
    name, *pairs = text.split()
    params: dict[str, Any] = {}
    for key, value in (p.split("=") for p in pairs):
        params[key] = float(value) if "." in value else int(value)
    options = {k: params.pop(k) for k in HARNESS if k in params}
    tune = {k[5:]: params.pop(k) for k in list(params) if k.startswith("tune_")}
    start = time.perf_counter()
    weights, groups, solver = lab.quantize(get_method(name, **params), **options)
    dense = {k: v.clone() for k, v in lab.model.state_dict().items() if "experts" not in k}
    if tune:
        groups = distill(lab.model, lab.calib_final, groups, lab.calib, **tune)
        dequantized = [torch.stack([m.dequantize() for m in g]) for g in groups]
        weights = list(zip(dequantized[::2], dequantized[1::2], strict=True))
    _, final = lab.stream(lab.dev, weights, keep=False)
    lab.model.load_state_dict(dense, strict=False)
    nll, kl = lab.score(final)
    bits = [ideal_bits(g) for g in groups]
    size = [sum(m.codes.numel() for m in g) for g in groups]
    total = sum(size)
    return {
        "run": text,
        "bits": round(sum(a + b for a, b in bits) / total, 4),
        "stored": round(sum(stored_bits(g) for g in groups) / total, 4),
        "side": round(sum(b for _, b in bits) / total, 4),
        "ppl": round(math.exp(nll), 3),
        "rise": round(100 * (math.exp(nll - lab.nll) - 1), 2),
        "kl": round(kl, 5),
        "layers": [round((a + b) / n, 3) for (a, b), n in zip(bits, size, strict=True)],
        "solver": round(solver, 1),
        "seconds": round(time.perf_counter() - start, 1),
    }


def windows(tokenizer: Any, path: Path, count: int, skip: int = 0) -> Tensor:
    """`count` windows of CTX tokens after the first `skip`, [count, CTX]."""
    text = path.read_text(encoding="utf-8")[: (skip + count) * CTX * 8]
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    if len(ids) < (skip + count) * CTX:
        raise SystemExit(f"{path} has {len(ids)} tokens; {(skip + count) * CTX} are wanted of it")
    return ids[skip * CTX : (skip + count) * CTX].view(count, CTX)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("model")
    p.add_argument("--run", action="append", required=True, help='e.g. "rd delta=8 drift=0.5"')
    p.add_argument("--calib", type=Path, default=TEXT / "calib.txt")
    p.add_argument("--text", type=Path, default=TEXT / "dev.txt")
    p.add_argument("--windows", type=int, default=256, help=f"windows of {CTX} tokens, both texts")
    p.add_argument("--seed", type=int, default=0, help="which part of the calibration text")
    p.add_argument("--threads", type=int, default=1)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    calib = windows(tokenizer, a.calib, a.windows, a.seed * a.windows)
    lab = Lab(a.model, calib, windows(tokenizer, a.text, a.windows))
    first = {"model": a.model, "seed": a.seed, "ppl": round(math.exp(lab.nll), 3)}
    print(json.dumps(first), flush=True)
    for text in a.run:
        print(json.dumps(report(lab, text)), flush=True)


if __name__ == "__main__":
    main()
