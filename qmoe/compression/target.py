"""``--model-bits``: one target for the whole file, divided among experts and dense matrices.

A dense weight works for every token, an expert's for k of E of them: its error counts E / k times,
which is worth log2(E / k) / 2 bits at one slope, and _BUSY bits more by measurement
(docs/log-quant.md). Only shapes are needed, so that the plan knows both rates.
"""

import math
from dataclasses import replace
from typing import Any

from qmoe.compression import estimate
from qmoe.compression.allocation import Part, slope, total
from qmoe.compression.carried import account
from qmoe.compression.dense import DenseCoder
from qmoe.compression.job import Job
from qmoe.compression.plan import carried_bytes, stored_bytes
from qmoe.compression.rate import MAX_BITS, MIN_BITS
from qmoe.errors import QmoeError
from qmoe.types import ExpertsLayout

_BUSY = 1.0  # bits that a dense matrix has before experts of which every token takes all
_ENTRY = 160  # bytes that a tensor takes in headers and index of the files


def settle_model_bits(job: Job) -> Job:
    """A job whose `bits` and `dense_bits` follow from its `model_bits`; others are returned as they
    are. Needs shapes only.

    Raises:
        QmoeError: the target is out of the model's reach.
    """
    target = job.settings.model_bits
    if target is None:
        return job
    streamed = job.streamed
    shapes = {n: t.shape for n, t in streamed.model.state_dict().items()}
    coded = DenseCoder(job, bits=4.0).names()
    encoded = {n for b in streamed.blocks() for n in streamed.encoded_names(b)}
    plain = [n for n in shapes if n not in encoded and n not in coded]
    layouts = [layout for layout, _ in streamed.experts]
    fixed = 8.0 * sum(stored_bytes(streamed, n, 4 * shapes[n].numel()) for n in plain)
    fixed += 8.0 * (carried_bytes(streamed) + _ENTRY * (len(plain) + 2 * len(layouts)))
    dense = [Part(shapes[n].numel()) for n in sorted(coded)]
    experts = [Part(la.weights, -_apart(streamed.config, la), MIN_BITS, MAX_BITS) for la in layouts]
    weights = sum(p.weights for p in (*dense, *experts))
    every = weights + sum(shapes[n].numel() for n in plain if streamed.sources.get(n))
    every += account(streamed)["carried_weights"]
    budget = target * every - fixed
    least, most = (total([*dense, *experts], t) for t in (-200.0, 200.0))
    if not least <= budget <= most:
        raise QmoeError(
            f"--model-bits {target:g}: this model can take {(least + fixed) / every:.2f} to "
            f"{(most + fixed) / every:.2f} bits per weight"
        )
    t = slope([*dense, *experts], budget)
    bits = total(experts, t) / sum(p.weights for p in experts)
    dense_bits = total(dense, t) / sum(p.weights for p in dense) if dense else 16
    settings = replace(job.settings, bits=round(bits, 4), dense_bits=round(dense_bits, 4))
    return replace(job, settings=settings)


def _apart(config: Any, layout: ExpertsLayout) -> float:
    """Bits per weight that dense matrices have before a layer's experts."""
    return _BUSY + math.log2(layout.experts / estimate.slots(config, [layout])) / 2
