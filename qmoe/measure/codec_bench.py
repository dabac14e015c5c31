"""`qmoe bench codec`: size beside the ideal, speed beside memory bandwidth, synthetic layers.

Weights are Laplace with log-normal row and column energies (as waterfilled columns have), rounded
to a uniform step that sets the rate. Every figure is measured in this run, after the round trip has
been checked, in seconds of CPU time of one thread, so that other work on the machine matters less.
"""

import json as jsonlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from qmoe.codec.decoder.decode import decode_codes, decode_dense, matvec
from qmoe.codec.decoder.matrix import ParsedMatrix, parse_matrix
from qmoe.codec.encoder.encode import encode_group
from qmoe.codec.encoder.ideal import class_entropy_bits, ideal_bits
from qmoe.codec.format.tables import parse_tables
from qmoe.measure.dictionary import dictionary_bits
from qmoe.types import QuantizedMatrix

SHAPES = ((2048, 768), (4096, 1024), (768, 3072))
STEPS = (1.0, 1.8, 2.9, 4.2, 6.2)  # about 2, 1.3, 0.8, 0.5 and 0.3 bits
_SECONDS = 0.3  # least time spent on a figure
_HEAVY = 0.01  # share of columns several times larger than the rest


def synthetic(
    rows: int, cols: int, step: float, count: int = 4, seed: int = 0
) -> list[QuantizedMatrix]:
    """Quantized matrices with realistic energies.

    Args:
        rows, cols: shape.
        step: quantizer step in units of the median weight's standard deviation.
        count: number of matrices.
        seed: of the weights.
    """
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        row, col = np.exp(rng.normal(0, 0.35, rows)), np.exp(rng.normal(0, 0.6, cols))
        heavy = rng.random(cols) < _HEAVY
        col[heavy] *= rng.uniform(2, 12, int(heavy.sum()))
        weights = rng.laplace(0, 0.5**0.5, (rows, cols)) * row[:, None] * col
        codes = np.clip(np.rint(weights / step), -127, 127).astype(np.int8)
        row_index = (np.rint(np.log2(row) * 16) * 4).astype(np.int16)
        col_index = (np.rint(np.log2(step / col) * 4) * 16).astype(np.int16)
        out.append(QuantizedMatrix(*(torch.from_numpy(a) for a in (codes, row_index, col_index))))
    return out


def run(json: bool = False) -> dict[str, Any]:
    """Runs the benchmark and prints it.

    Args:
        json: whether the last line printed is the returned value as JSON.

    Returns:
        {"bench": "codec", "bandwidth": bytes/s, "results": [one dict per shape and step]}; bits
        are per weight, speeds in weights/s on one core.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        report = _run()
    finally:
        torch.set_num_threads(threads)
    if json:
        print(jsonlib.dumps(report))
    return report


def _run() -> dict[str, Any]:
    bandwidth = _bandwidth()
    print(f"memory bandwidth, one core: {bandwidth / 1e9:.1f} GB/s read")
    print(
        "bits per weight; speeds in million weights/s, in brackets what the bandwidth would allow"
    )
    print(
        f"{'shape':>10} {'stored':>7} {'ideal':>7} {'over':>6} {'class H':>7} {'16-bit dict':>11} "
        f"{'encode':>14} {'parse':>14} {'dense f32':>14} {'codes':>14} {'matvec':>14}"
    )
    results = []
    for rows, cols in SHAPES:
        for step in STEPS:
            result = _measure(rows, cols, step, bandwidth)
            results.append(result)
            speeds = " ".join(
                f"{result[name] / 1e6:6.0f} [{result[name + '_bandwidth_ideal'] / 1e6:5.0f}]"
                for name in ("encode", "parse", "decode_dense", "decode_codes", "matvec")
            )
            print(
                f"{rows:>5}x{cols:<4} {result['stored']:7.4f} {result['ideal']:7.4f} "
                f"{result['overhead_percent']:5.2f}% {result['class_entropy']:7.4f} "
                f"{result['dictionary']:11.4f} {speeds}"
            )
    return {"bench": "codec", "bandwidth": bandwidth, "results": results}


def _measure(rows: int, cols: int, step: float, bandwidth: float) -> dict[str, Any]:
    matrices = synthetic(rows, cols, step)
    n = rows * cols * len(matrices)
    group = encode_group(matrices)
    tables = parse_tables(group.tables)
    layouts = [parse_matrix(tables, b) for b in group.matrices]
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(1, cols)).astype(np.float32))
    for matrix, layout in zip(
        matrices, layouts, strict=True
    ):  # a speed is only worth a right result
        dense = matrix.dequantize()
        if not torch.equal(decode_codes(tables, layout).codes, matrix.codes):
            raise AssertionError(f"decoded codes differ at {rows} x {cols}, step {step}")
        if not torch.equal(decode_dense(tables, layout), dense):
            raise AssertionError(f"decoded weights differ at {rows} x {cols}, step {step}")
        exact = x.double() @ dense.double().T
        if (matvec(tables, layout, x) - exact).norm() > 1e-5 * exact.norm():
            raise AssertionError(f"matvec differs at {rows} x {cols}, step {step}")

    def each(work: Callable[[ParsedMatrix], object]) -> float:
        return n / _seconds(lambda: [work(layout) for layout in layouts])

    stored, ideal = group.stored_bits / n, ideal_bits(matrices, group.scale_bits) / n
    read = stored / 8
    return {
        "rows": rows,
        "cols": cols,
        "step": step,
        "code_limit": tables.limit,
        "stored": stored,
        "ideal": ideal,
        "overhead_percent": 100 * (stored / ideal - 1),
        "class_entropy": class_entropy_bits(matrices) / n,
        "dictionary": dictionary_bits(matrices) / n,
        "encode": n / _seconds(lambda: encode_group(matrices)),
        "encode_bandwidth_ideal": bandwidth / (1 + read),
        "parse": n / _seconds(lambda: [parse_matrix(tables, b) for b in group.matrices]),
        "parse_bandwidth_ideal": bandwidth / read,
        "decode_dense": each(lambda layout: decode_dense(tables, layout)),
        "decode_dense_bandwidth_ideal": bandwidth / (4 + read),
        "decode_codes": each(lambda layout: decode_codes(tables, layout)),
        "decode_codes_bandwidth_ideal": bandwidth / (1 + read),
        "matvec": each(lambda layout: matvec(tables, layout, x)),
        "matvec_bandwidth_ideal": bandwidth / read,
    }


def _seconds(work: Callable[[], object]) -> float:
    """CPU time of the shortest of several runs."""
    best, spent = float("inf"), 0.0
    while spent < _SECONDS:
        start = time.thread_time()
        work()
        took = time.thread_time() - start
        best, spent = min(best, took), spent + took
    return best


def _bandwidth() -> float:
    """Bytes/s at which one core sums an array far larger than its caches."""
    data = torch.ones(64 << 20)
    return 4 * data.numel() / _seconds(data.sum)
