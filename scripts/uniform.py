"""A checkpoint coded with one step for all experts: the rate without the time of a solver."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qmoe.compression.coding import encode_experts
from qmoe.models.classes import plain_config
from qmoe.models.families.find import KINDS, find_experts, read_expert
from qmoe.store.writer import ContainerWriter
from qmoe.types import QuantizedMatrix, grid_index, grid_scale

_TRIES = 12


def rounded(weight: Tensor, step: int) -> QuantizedMatrix:
    """Nearest integers at a step of the grid of scales."""
    codes = torch.round(weight.float() / grid_scale(torch.tensor(step))).clamp(-127, 127)
    rows, cols = weight.shape
    zeros = torch.zeros(rows, dtype=torch.int16)
    return QuantizedMatrix(codes.to(torch.int8), zeros, torch.full((cols,), step).short())


def step_for(weight: Tensor, bits: float) -> int:
    """The step at which a matrix takes so many stored bits a weight."""
    middle = int(grid_index(weight.float().std()))
    low, high = middle - 400, middle + 400
    for _ in range(_TRIES):
        step = (low + high) // 2
        size = encode_experts("x", [0], [rounded(weight, step)]).encoded.stored_bits
        low, high = (low, step) if size / weight.numel() < bits else (step, high)
    return (low + high) // 2


def code_uniformly(source: Path, out: Path, bits: float) -> None:
    """Compresses a model whose experts are fused modules."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    found = dict((layout.path, (layout, module)) for layout, module in find_experts(model))
    tensors = model.state_dict()
    for layout, module in found.values():
        for name in KINDS[layout.kind].encoded(module):
            del tensors[f"{layout.path}.{name}"]
    layout, module = next(iter(found.values()))
    step = step_for(read_expert(module, 0)[layout.projections[0].name], bits)
    with ContainerWriter(out) as writer:
        with writer.block("all") as block:
            for name, tensor in tensors.items():
                block.add_tensor(name, tensor)
            for path, (layout, module) in found.items():
                experts = block.experts(layout)
                for projection in layout.projections:
                    matrices = [
                        rounded(read_expert(module, e)[projection.name], step)
                        for e in range(layout.experts)
                    ]
                    names = list(range(layout.experts))
                    experts.add_batch(encode_experts(projection.name, names, matrices))
                block.finish_experts(path, [1] * layout.experts, [""] * layout.experts)
        config = plain_config(model.config) | {"architectures": [type(model).__name__]}
        writer.finish(
            ["all"],
            config=config | {"dtype": "bfloat16"},
            settings={"method": "uniform"},
            versions={},
            source={"name": source.name, "bytes": 0},
        )
