"""What models that do not fit here would cost on GPUs: their arithmetic at measured rates."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from qmoe.calib.routing import second_moment
from qmoe.codec import encode_group, ideal_bits
from qmoe.quantize import Problem, get_method


@dataclass(frozen=True)
class Paper:
    """A model that is only computed."""

    name: str
    layers: int
    experts: int
    slots: int
    first: tuple[int, int]  # rows and cols of gate and up together, or of up
    down: tuple[int, int]
    dense: float  # parameters that are no experts'
    source: float  # bytes as shipped

    def cost(self, tokens: int, streams: int = 2) -> dict[str, float]:
        """Operations in float32 and float64, weights to code and bytes to read."""
        matrices = (self.first, self.down)
        weights = self.layers * self.experts * sum(r * c for r, c in matrices)
        rows = tokens * self.slots * self.layers
        # every stream runs the dense part twice; experts run once for the activations and once for
        # the outputs
        forward = 4.0 * streams * tokens * self.dense
        per_row = 2 * self.first[0] * self.first[1] + self.down[0] * self.down[1]
        forward += 2.0 * streams * rows * per_row
        hessians = 2.0 * streams * rows * sum(c * c for _, c in matrices)
        each = self.layers * self.experts
        return {
            "forward": forward,
            "hessians": hessians,
            "factors": each * sum(5.0 * c**3 for _, c in matrices),
            "feedback": each * sum(8.0 * r * c * c for r, c in matrices),
            "coder": float(weights),
            "disk": self.source,
        }


PAPER = (
    Paper("DeepSeek-V3", 58, 256, 8, (4096, 7168), (7168, 2048), 17e9, 689e9),
    Paper("Kimi-K2", 60, 384, 8, (4096, 7168), (7168, 2048), 12e9, 1030e9),
    Paper("switch-c-2048", 30, 2048, 1, (6144, 2080), (2080, 6144), 0.5e9, 3140e9),
)
# of one H200, in operations per second: assumed, half of the data sheet's float32 and a seventh of
# its float64 tensor rate; 16 processor cores and 2 GB/s of disk beside each GPU
H200 = {"float32": 33e12, "float64": 10e12, "cores": 16.0, "disk": 2e9}


def rates() -> dict[str, float]:
    """Speeds of one core here, in processor seconds: solver and coder on matrices of Qwen3-MoE."""
    torch.set_num_threads(1)
    rows, cols, tokens, count = 1536, 2048, 4096, 2
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, cols, generator=generator)
    solve = get_method("rd", delta=1.0).solve
    seconds: dict[str, float] = {}

    def timed(name: str, f: Any) -> Any:
        start = time.process_time()
        out = f()
        seconds[name] = time.process_time() - start
        return out

    h = timed("hessian", lambda: second_moment(x))

    def problem(height: int) -> Any:
        w = torch.randn(count, height, cols, generator=generator) * 0.02
        both = h.expand(count, -1, -1)
        seen = torch.full((count,), tokens)
        return Problem(w, both.clone(), seen, h, tokens, both.clone())

    encode_group(solve(problem(64)).matrices)  # compiles
    short, tall = problem(64), problem(rows)
    timed("short", lambda: solve(short))
    matrices = timed("tall", lambda: solve(tall)).matrices
    encoded = timed("encode", lambda: encode_group(matrices))
    timed("ideal", lambda: ideal_bits(matrices, encoded.scale_bits))
    weights = count * rows * cols
    step = (seconds["tall"] - seconds["short"]) / (rows - 64)
    return {
        "hessians": 2.0 * tokens * cols * cols / seconds["hessian"],
        "factors": count * 5.0 * cols**3 / (seconds["short"] - 64 * step),
        "feedback": count * 8.0 * cols * cols / step,
        "coder": weights / (seconds["encode"] + seconds["ideal"]),
    }


def paper(tokens: int = 131072) -> dict[str, Any]:
    """The arithmetic for models that do not fit here; minutes."""
    speed = rates()
    flops = [f"{k} {v / 1e9:.1f} GFLOP/s" for k, v in speed.items() if k != "coder"]
    print(f"one core here: {', '.join(flops)}, coder {speed['coder'] / 1e6:.0f} M weights/s")
    out: dict[str, Any] = {"rates": speed, "models": []}
    print("| model | machine | forward | Hessians | factors | feedback | coder | sum | disk |")
    print("|---|---|---|---|---|---|---|---|---|")
    for model in PAPER:
        cost = model.cost(tokens)
        for gpus in (1, 8, 64):
            per = {
                "forward": H200["float32"],
                "hessians": H200["float32"],
                "factors": H200["float64"],
                "feedback": H200["float32"],
                "coder": speed["coder"] * H200["cores"],
                "disk": H200["disk"],
            }
            minutes = {k: cost[k] / per[k] / gpus / 60 for k in per}
            total = sum(v for k, v in minutes.items() if k != "disk")
            cells = [f"{minutes[k]:.1f}" for k in per if k != "disk"]
            line = [model.name, f"{gpus} H200", *cells, f"{total:.1f}", f"{minutes['disk']:.1f}"]
            print("| " + " | ".join(line) + " |")
            row = {"name": model.name, "gpus": gpus, "total_minutes": total, "minutes": minutes}
            out["models"].append(row)
        weak = sum(cost[k] / speed[k] for k in ("hessians", "factors", "feedback", "coder"))
        weak += cost["forward"] / speed["hessians"]
        print(f"| {model.name} | 64 cores as here | | | | | | {weak / 64 / 60:.0f} | |")
    return out
