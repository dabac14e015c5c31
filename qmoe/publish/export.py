"""``qmoe export``: back to a plain checkpoint in the layout in which the family is published,
which any runtime reads.

One block is decoded at a time. Knows nothing about calibration or solvers.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from qmoe.errors import OutputError
from qmoe.inference.structure import build, check
from qmoe.models.classes import plain_config
from qmoe.models.families.find import KINDS
from qmoe.models.precision import kept_apart
from qmoe.store.reader import Container
from qmoe.store.stored_dense import STREAM
from qmoe.store.writer import CARRIED_BLOCK, carried_files
from qmoe.system.files import canonical_json, check_vacant, staged, write_file
from qmoe.system.spill import Spill

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Exported:
    """A checkpoint that was written.

    Attributes:
        directory: where it is.
        dtype: of its weights.
        stored_bytes: of its weight files.
    """

    directory: Path
    dtype: str
    stored_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `qmoe export`."""
        return {"dest": str(self.directory), "dtype": self.dtype, "bytes": self.stored_bytes}


def export(
    directory: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    dtype: str = "bfloat16",
    progress: Callable[[int], object] | None = None,
) -> Exported:
    """Writes a dense checkpoint.

    Encoded weights are the decoded ones rounded to `dtype`; in float32 they are exact. Other
    tensors keep their stored precision if it is not higher than `dtype`, or if transformers keeps
    them in float32.

    Args:
        directory: a compressed checkpoint.
        destination: must not exist, or be empty.
        dtype: "bfloat16", "float16" or "float32".
        progress: called with 1 after every block.

    Raises:
        CorruptError: the checkpoint is not sound.
        OutputError: the destination exists or cannot be written.
    """
    if dtype not in DTYPES:
        raise OutputError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    out = Path(os.path.abspath(destination))
    check_vacant(out)
    container = Container.open(directory)
    with staged(out, "export") as work:
        _write(container, work, DTYPES[dtype], progress)
    size = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    return Exported(out, dtype, size)


def _write(
    container: Container, work: Path, dtype: torch.dtype, progress: Callable[[int], object] | None
) -> None:
    check(container)
    model = build(container, dtype)
    plan = kept_apart(model, dtype)
    blocks = container.manifest["blocks"]
    width = max(5, len(str(len(blocks))))
    weight_map: dict[str, str] = {}
    total = 0
    for i, (block, files) in enumerate(blocks.items()):
        names = [name for name, (file, _, _) in container.tensors.items() if file in files]
        names += [name for name, (file, _, _) in container.carried.items() if file in files]
        file = f"model-{i + 1:0{width}d}-of-{len(blocks):0{width}d}.safetensors"
        spill = Spill(work / "spill")
        try:
            for name, tensor in _published(container, model, block, names, dtype, plan):
                spill.add(name, tensor)
                weight_map[name] = file
                total += tensor.nbytes
            spill.write_shard(work / file, spill.shards(1 << 62)[0])
        finally:
            spill.close()
        if progress is not None:
            progress(1)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_file(work / "model.safetensors.index.json", canonical_json(index))
    config = plain_config(model.config)
    config.pop("quantization_config", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_file(work / "config.json", canonical_json(config))
    for name, data in carried_files(container.directory).items():
        write_file(work / name, data)


def _published(
    container: Container,
    model: nn.Module,
    block: str,
    names: list[str],
    dtype: torch.dtype,
    kept: set[str],
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of one block under the names that the family is published with; carried ones as they
    came."""
    if block == CARRIED_BLOCK:
        yield from ((name, container.read(name)) for name in sorted(names))
        return
    dense = _decoded(container, model, names, dtype, kept)
    yield from sorted(revert_weight_conversion(model, dense).items())


def _decoded(
    container: Container,
    model: nn.Module,
    names: list[str],
    dtype: torch.dtype,
    kept: set[str],
) -> dict[str, Tensor]:
    """{module parameter name: tensor} of one block, dense matrices decoded, experts decoded into
    their module's own layout."""
    out: dict[str, Tensor] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        if path in container.dense:  # one of its two tensors stands for both
            if leaf == STREAM:
                weight = container.dense_matrix(path).decode()
                out[path] = _narrowed(weight, dtype, path in kept)
        elif path not in container.modules or leaf not in ("stream", "offsets"):
            out[name] = _narrowed(container.read(name), dtype, name in kept)
        elif leaf == "stream":
            out |= _experts(container, model.get_submodule(path), path, dtype)
    return out


def _narrowed(tensor: Tensor, dtype: torch.dtype, kept: bool) -> Tensor:
    if not tensor.is_floating_point() or kept:
        return tensor
    return tensor.to(dtype)


def _experts(container: Container, module: Any, path: str, dtype: torch.dtype) -> dict[str, Tensor]:
    streams = container.experts(path)
    kind = KINDS[streams.layout.kind]
    names = kind.encoded(module)
    for name in names:  # from the meta device into memory, one module at a time
        owner, _, leaf = name.rpartition(".")
        parent = module.get_submodule(owner)
        shape = parent._parameters[leaf].shape
        parent._parameters[leaf] = nn.Parameter(
            torch.empty(shape, dtype=dtype), requires_grad=False
        )
    for expert in range(streams.layout.experts):
        weights = {
            p.name: streams.dense(expert, j) for j, p in enumerate(streams.layout.projections)
        }
        kind.write(module, expert, weights)
    out = {f"{path}.{name}": module.get_parameter(name).detach() for name in names}
    module.to("meta")
    return out
