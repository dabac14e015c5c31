"""How fast experts are laid out for the kernels when a model is loaded: parsed, rewritten, cut and
interleaved, checked on the way.
"""

import json as json_module
import time
from typing import Any

import torch

from qmoe.inference.cuda import cores, pack_streams, workers
from qmoe.kernels.launch import PLANS, forced
from qmoe.measure.kernels.sample import stored_layer

SHAPES = ((1536, 2048), (2048, 768))  # Qwen3-30B-A3B
EXPERTS = 16
LARGE = 30e9  # expert weights of a model


def run(json: bool = False, rounds: int = 3) -> dict[str, Any]:
    """Packs a layer of 16 experts of Qwen3-30B-A3B's shape on one core and on all.

    Args:
        json: print one line of JSON instead of sentences.
        rounds: the fastest counts.

    Returns:
        {"weights_per_s_core" (by processor time of one thread), "weights_per_s" (by the clock, all
        cores), "cores", "weights_per_s_copy" (the ideal: the stored bytes copied once), "segments",
        "stored_bits", "resident_bits" (per weight)}.
    """
    streams = stored_layer(SHAPES, EXPERTS, 0.8, 4)
    weights = streams.layout.weights
    cpu = torch.device("cpu")
    one, copy, many = [], [], []
    with forced(PLANS[90]), workers() as pool:
        made = pack_streams(streams, cpu, 8)  # compiles the loops
        for _ in range(rounds):
            begin = time.thread_time()
            pack_streams(streams, cpu, 8)
            one.append(time.thread_time() - begin)
            begin = time.thread_time()
            for e in range(EXPERTS):
                for j in range(len(SHAPES)):
                    streams.stream[slice(*streams.offsets[e, j, 2:].tolist())].clone()
            copy.append(time.thread_time() - begin)
            begin = time.perf_counter()
            pack_streams(streams, cpu, 8, pool)
            many.append(time.perf_counter() - begin)
    stored = int((streams.offsets[:, :, 3] - streams.offsets[:, :, 2]).sum())
    result = {
        "weights_per_s_core": weights / min(one),
        "weights_per_s": weights / min(many),
        "cores": cores(),
        "weights_per_s_copy": weights / min(copy),
        "segments": [p.segments for p in made.values()],
        "stored_bits": 8 * stored / weights,
        "resident_bits": 8 * sum(p.nbytes() for p in made.values()) / weights,
    }
    print(json_module.dumps(result) if json else report(result))
    return result


def report(result: dict[str, Any]) -> str:
    """The result of `run` in sentences."""
    core = result["weights_per_s_core"]
    return (
        f"packing: {core / 1e6:.0f} M weights/s and core "
        f"(the stored bytes copied: {result['weights_per_s_copy'] / 1e6:.0f} M), "
        f"{result['weights_per_s'] / 1e6:.0f} M weights/s on {result['cores']} cores; "
        f"30 B weights on 16 cores: {LARGE / core / 16:.0f} s\n"
        f"{result['resident_bits']:.2f} bits a weight resident in {result['segments']} segments, "
        f"{result['stored_bits']:.2f} stored"
    )
