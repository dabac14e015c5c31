"""A checkpoint coded with one step for all experts: the rate without the time of a solver."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qmoe.compression.coding import encode_experts, encode_planes
from qmoe.models.classes import plain_config
from qmoe.models.families.find import KINDS, find_experts, read_expert
from qmoe.store.block import BlockWriter
from qmoe.store.stored_dense import DenseGeometry
from qmoe.store.writer import ContainerWriter
from qmoe.types import QuantizedMatrix, grid_index, grid_scale

_TRIES = 12
BAND, NARROWEST = 1024, 128  # rows of a band; a router stays as it is


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


def add_dense(block: BlockWriter, name: str, weight: Tensor, step: int) -> None:
    """A dense matrix in bands of one plane, as `--dense-bits 4` codes it."""
    rows, cols = weight.shape
    geometry = DenseGeometry(name, rows, cols, min(rows, BAND), 1)
    bands = (weight[band.start : band.stop] for band in geometry.bands)
    coded = (encode_planes([rounded(w, step)], tuple(w.shape)) for w in bands)
    block.add_dense(geometry, coded, delta=1.0, note="")


def code_uniformly(source: Path, out: Path, bits: float, dense_bits: float = 16) -> None:
    """Compresses a model whose experts are fused modules.

    Args:
        source: a checkpoint of transformers.
        out: the compressed one.
        bits: of the experts, stored bits a weight.
        dense_bits: of the matrices outside of them, up to 5; 16 leaves them as they are.
    """
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
                if dense_bits < 16 and tensor.ndim == 2 and min(tensor.shape) >= NARROWEST:
                    add_dense(block, name, tensor, step_for(tensor[:BAND], dense_bits))
                else:
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
