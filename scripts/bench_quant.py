"""Solver throughput in weights per second on one core, beside the floor: the Hessian product alone.

    python scripts/bench_quant.py --widths 256,512,1024,2048,4096 --experts 1,4

Weights are [2 * width, width]; every expert has `--tokens` tokens. Checks first that the compiled
and the torch path agree. The last line is JSON.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from qmoe.quantize import Problem, get_method
from qmoe.quantize.feedback import Grid, feed_back
from qmoe.quantize.linalg import damped, inverse_factor


def best(run: Callable[[], Any], repeats: int) -> float:
    """Processor seconds of the fastest of `repeats` runs: other programs may share the machine."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def bench(width: int, experts: int, tokens: int, repeats: int) -> dict[str, float]:
    """Millions of weights per second of every stage; `floor` is H = X^T X for the same weights."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(experts, tokens, width, generator=g)
    x[:, :, : width // 8] *= 4
    w = torch.randn(experts, 2 * width, width, generator=g) / width**0.5
    h = x.mT @ x
    cross = (x + 0.1 * torch.randn(x.shape, generator=g)).mT @ x
    count = torch.full((experts,), tokens)
    problem = Problem(w, h, count, h.sum(0), tokens * experts, cross)
    factor, _ = inverse_factor(damped(h, 0.1))
    delta = 1.5 * tokens**0.5 / width**0.5
    grid = Grid.symmetric(
        (delta * factor.diagonal(dim1=-2, dim2=-1)).float(), torch.ones(experts, 2 * width)
    )
    methods = {"qmoe": get_method("qmoe"), "rd": get_method("rd", delta=delta)}
    runs: dict[str, Callable[[], Any]] = {
        "floor": lambda: x.mT @ x,
        "factor": lambda: inverse_factor(damped(h, 0.1)),
        "feedback": lambda: feed_back(w, factor, grid),
        **{name: lambda m=m: m.solve(problem) for name, m in methods.items()},
    }
    feed_back(w[:, :1], factor, Grid.symmetric(grid.col, grid.row[:, :1]))  # compiles
    return {name: w.numel() / best(run, repeats) / 1e6 for name, run in runs.items()}


def check() -> None:
    """Compiled and torch feedback agree bit for bit."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 300, 100, generator=g), torch.randn(2, 70, 100, generator=g)
    factor, _ = inverse_factor(damped(x.mT @ x, 0.1))
    grid = Grid.symmetric(factor.diagonal(dim1=-2, dim2=-1).float() * 10, torch.ones(2, 70))
    a = feed_back(w, factor, grid, compiled=True)
    if not torch.equal(a, feed_back(w, factor, grid, compiled=False)):
        raise SystemExit("compiled and torch feedback differ")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--widths", default="256,512,1024,2048,4096")
    p.add_argument("--experts", default="1,4")
    p.add_argument("--tokens", type=int, default=2048)
    p.add_argument("--repeats", type=int, default=2)
    a = p.parse_args()
    torch.set_num_threads(1)
    check()
    rows = []
    for width in map(int, a.widths.split(",")):
        for experts in map(int, a.experts.split(",")):
            speed = bench(width, experts, a.tokens, a.repeats)
            rows.append({"width": width, "experts": experts, **speed})
            shown = "  ".join(f"{k} {v:7.2f}" for k, v in speed.items())
            print(f"width {width:5d}  experts {experts:3d}  M weights/s: {shown}", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
