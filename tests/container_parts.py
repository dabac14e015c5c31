"""A compressed checkpoint of two blocks with a few bytes each, for tests of the container."""

import hashlib

import torch

from qmoe.compression.coding import encode_experts
from qmoe.store.manifest import MANIFEST, read_sealed, write_sealed
from qmoe.store.writer import ContainerWriter
from qmoe.types import ExpertsLayout, ProjectionShape, QuantizedMatrix

FINISH = {"config": {"model_type": "x"}, "settings": {}, "versions": {}, "source": {}}
LAYOUT = ExpertsLayout("m.experts", "fused", 2, (ProjectionShape("up", 8, 16, False),))


def matrix(seed):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (8, 16), generator=g, dtype=torch.int8)
    return QuantizedMatrix(
        codes, torch.zeros(8, dtype=torch.int16), torch.zeros(16, dtype=torch.int16)
    )


def fill(writer, name, seed=0):
    with writer.block(name) as block:
        g = torch.Generator().manual_seed(seed)
        block.add_tensor(f"{name}.w", torch.randn(3, 5, generator=g).bfloat16())
        block.add_tensor(f"{name}.scalar", torch.tensor(4, dtype=torch.int64))
        block.add_tensor(f"{name}.empty", torch.zeros(0, 7))
        if name == "m":
            experts = block.experts(LAYOUT)
            for e in (1, 0):
                experts.add_batch(encode_experts("up", [e], [matrix(e)]))
            block.finish_experts("m.experts", [5, 0], ["", "no tokens: rounded"])
        block.note = {"seed": seed}


def make(out, blocks=("m", "rest"), **options):
    with ContainerWriter(out, **options) as writer:
        for i, name in enumerate(blocks):
            fill(writer, name, i)
        return writer.finish(list(blocks), **FINISH)


def tree(directory):
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


def reseal(directory, **changes):
    """Makes a changed directory consistent with its manifest again, as a malicious writer would."""
    manifest = read_sealed(directory / MANIFEST) | changes
    for name in manifest["files"]:
        data = (directory / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_sealed(directory / MANIFEST, manifest)
