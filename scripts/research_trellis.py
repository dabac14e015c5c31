"""What trellis-coded integers would be worth in the solver: a measurement, not a format.

    python scripts/research_trellis.py examples/tiny-domains --texts examples/text/domains
        --out DIR [--states 0,4,8] [--steps 3.6,4.4]

Two quantizers, even multiples of the step and odd ones with zero; which of them an element uses is
the state of an Ungerboeck code (4 or 8 states) that the parities of the integers above it in its
column drive. The path is the one of least squared error (Viterbi, no
rate term), errors go on to the next columns as ever. States 0 is plain rounding. Bits are ideal:
one histogram for each class of row and column, and for each of the two quantizers.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from research_ingredients import Bench, Domains, Step, Variant
from research_quant import entropy
from torch import Tensor

from qmoe.quantize import Problem, get_method
from qmoe.quantize.linalg import inverse_factor
from qmoe.quantize.rd import Options, _both_ways, _order, _target, regular
from qmoe.types import grid_index, grid_scale

SPAN = 4096  # rows after which the code begins anew; at 32, a warp of the kernel, it wins nothing
Ints, Floats = NDArray[np.int64], NDArray[np.float32]
CODES = {4: (0b101, 0b010), 8: (0b1011, 0b0100)}  # parity checks h0, h1 of Ungerboeck's codes


def machine(states: int) -> tuple[Ints, Ints]:
    """Next state by (state, parity), and the quantizer that a state uses."""
    h0, h1 = CODES[states]
    memory = states.bit_length() - 1
    following = np.zeros((states, 2), np.int64)
    half = np.zeros(states, np.int64)
    for s in range(states):
        w = [s >> i & 1 for i in range(memory)] + [0]
        half[s] = w[0]
        for parity in (0, 1):
            bits = [w[i + 1] ^ (h0 >> i + 1 & w[0]) ^ (h1 >> i + 1 & parity) for i in range(memory)]
            following[s, parity] = sum((b & 1) << i for i, b in enumerate(bits))
    return following, half


@numba.njit(cache=True)
def _level(k: int, half: int) -> float:
    if half == 0:
        return 2.0 * k
    return 2.0 * k - (1.0 if k > 0 else -1.0 if k < 0 else 0.0)


@numba.njit(cache=True)
def _nearest(v: float, half: int, parity: int) -> tuple[int, float]:
    """The best integer of a quantizer with a parity, for a value in steps."""
    best, least = 0, 1e30
    if half == 0:
        near = int(np.rint(v / 2))
    else:
        near = int(np.rint((abs(v) + 1) / 2)) * (1 if v > 0 else -1)
    for k in range(near - 2, near + 3):
        if (k & 1) == parity:
            e = (v - _level(k, half)) ** 2
            if e < least:
                best, least = k, e
    return best, least


@numba.njit(cache=True)
def _column(v: Floats, following: Ints, half: Ints, out: Ints, halves: Ints) -> None:
    """Viterbi along rows that belong together."""
    rows, states = len(v), len(half)
    cost = np.full(states, 1e30)
    cost[0] = 0.0
    chosen = np.zeros((rows, states), np.int64)
    came = np.zeros((rows, states), np.int64)
    for r in range(rows):
        k, e = np.zeros((2, 2), np.int64), np.zeros((2, 2))
        for h in range(2):
            for p in range(2):
                k[h, p], e[h, p] = _nearest(v[r], h, p)
        then = np.full(states, 1e30)
        for s in range(states):
            if cost[s] < 1e29:
                for p in range(2):
                    n, c = following[s, p], cost[s] + e[half[s], p]
                    if c < then[n]:
                        then[n], chosen[r, n], came[r, n] = c, k[half[s], p], s
        cost = then
    s = int(np.argmin(cost))
    for r in range(rows - 1, -1, -1):
        out[r] = chosen[r, s]
        s = came[r, s]
        halves[r] = half[s]


@numba.njit(cache=True)
def _solve(
    w: Floats,
    u: Floats,
    step: Floats,
    following: Ints,
    half: Ints,
    codes: Ints,
    halves: Ints,
    back: Floats,
) -> None:
    """w [cols, rows] is used up."""
    cols, rows = w.shape
    for j in range(cols):
        for a in range(0, rows, SPAN):
            b = min(a + SPAN, rows)
            _column(w[j, a:b] / step[j], following, half, codes[j, a:b], halves[j, a:b])
        for r in range(rows):
            back[j, r] = step[j] * _level(codes[j, r], halves[j, r])
            error = (w[j, r] - back[j, r]) / u[j, j]
            w[j, r] = error
        for m in range(j + 1, cols):
            for r in range(rows):
                w[m, r] -= u[j, m] * w[j, r]


@dataclass(frozen=True)
class Trellis:
    """Integers [rows, cols], the quantizer of each, the weights they stand for."""

    codes: Tensor
    halves: Tensor
    weights: Tensor
    col_scale: Tensor

    def dequantize(self) -> Tensor:
        return self.weights


class TrellisStep(Step):
    """One layer with the integers of a trellis."""

    states = 8

    def _solved(self, problem: Problem) -> list[Any]:
        o = self.options
        h = regular(problem, problem.hessian.double(), o)[0]
        order = _order(h, o)
        factor, _ = inverse_factor(_both_ways(h, order))
        target = _target(problem, o.drift * torch.ones(len(h)), factor, order)
        fine = factor.diagonal(dim1=-2, dim2=-1)
        # steps of the union of both quantizers are half of those of each
        index = grid_index(o.delta / problem.importance**0.5 * fine / 2, o.col_step)
        step, back = grid_scale(index), torch.argsort(order, dim=1)
        found = []
        for w, u, s, b, i in zip(target, factor.float(), step, back, index, strict=True):
            of = (w.shape[1], w.shape[0])
            arrays = [np.zeros(of, t) for t in (np.int64, np.int64, np.float32)]
            given = (t.contiguous().numpy() for t in (w.T, u, s))
            _solve(*given, *machine(self.states), *arrays)
            codes, halves, weights = (torch.from_numpy(a.T.copy())[:, b] for a in arrays)
            found.append(Trellis(codes, halves, weights, i[b]))
        return found


def ideal(group: list[Any]) -> float:
    """Bits of a group: see the top; classes as `research_quant.ideal_bits` has them."""
    codes = torch.stack([m.codes for m in group]).long()
    size = codes.abs().float()
    row, col = size.mean(2), size.mean(1)
    row = row / row.mean(1, keepdim=True).clamp_min(1e-6)
    row = (2 * row.clamp_min(2**-4).log2()).round()
    col = (2 * col.clamp_min(2**-6).log2()).round()
    context = (row[:, :, None] + col[:, None]).clamp(-12, 8)
    if isinstance(group[0], Trellis):
        context = 2 * context + torch.stack([m.halves for m in group])
    side = 7.0 * row.numel() + entropy(row) + entropy(col)
    side += entropy(torch.stack([m.col_scale for m in group]).float())
    return entropy(codes, context) + side


@torch.no_grad()
def measured(lab: Domains, states: int, delta: float) -> tuple[float, dict[str, float]]:
    """Ideal bits a weight, KL by domain."""
    kind = TrellisStep if states else Step
    TrellisStep.states = states
    method = get_method("rd", delta=delta)
    stream, weights, bits, size = lab.streams[0], [], 0.0, 0
    for n, layer in enumerate(lab.layers):
        into = lab.enter(layer, stream)
        parts = (lab, method, into, lab.calib_hidden[n], *lab.weights[n])
        step = kind(Variant(stream=0.0), Options(delta), torch.zeros(()), *parts)
        for group, _ in step.solve(1.0, 1.0):
            bits += ideal(group)
            size += sum(m.codes.numel() for m in group)
        weights.append((step.new_gate_up, step.new_down))
        stream = step.output()
    _, final = lab.stream(lab.dev, weights, keep=False)
    return bits / size, lab.kl_by_domain(final)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("model")
    p.add_argument("--texts", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--states", type=lambda s: [int(x) for x in s.split(",")], default=[0, 4, 8])
    p.add_argument("--steps", type=lambda s: [float(x) for x in s.split(",")], default=[3.6, 4.4])
    p.add_argument("--bits", type=float, default=0.8)
    args = p.parse_args()
    lab = Bench(args).lab(0, Variant())
    for states in args.states:
        for delta in args.steps:
            bits, kl = measured(lab, states, delta)
            mean = math.exp(sum(math.log(k) for k in kl.values()) / len(kl))
            row = {"states": states, "step": delta, "bits": bits, "kl": kl, "mean": mean}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
