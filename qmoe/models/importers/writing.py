"""A transformers directory written tensor by tensor, checked against the model to load it."""

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qmoe.errors import SourceError
from qmoe.system.files import check_vacant, staged, writing
from qmoe.system.tensors import Streamed, tensor_bytes, write_tensors

SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class Part:
    """Where a tensor of the new model comes from.

    Attributes:
        shape, dtype: of the whole tensor.
        pieces: called once, yields the values in order; together they fill the tensor.
        sources: names of the source's tensors that go into it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterator[Tensor]]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Imported:
    """What an import did: `used` + `ignored` are all tensors of the source.

    Attributes:
        directory: the new checkpoint.
        parameters: number of values written.
        used: source tensors that went into the model.
        ignored: source tensors without a meaning for inference (version counters, buffers).
        notes: sentences for the user.
    """

    directory: Path
    parameters: int
    used: tuple[str, ...]
    ignored: tuple[str, ...]
    notes: tuple[str, ...]


def whole(value: Tensor, *sources: str) -> Part:
    """A tensor that goes into the model as it is."""
    return Part(tuple(value.shape), value.dtype, lambda: iter([value]), sources)


def write_model(
    destination: str | Path,
    config: Any,
    parts: dict[str, Part],
    stored: set[str],
    ignored: set[str],
    notes: tuple[str, ...] = (),
    more: Callable[[Path], object] = lambda directory: None,
) -> Imported:
    """Write a checkpoint under a temporary name and rename it when complete.

    Args:
        destination: directory to create.
        config: the model's config; its class must be registered with transformers.
        parts: by parameter name of the model.
        stored: names of all tensors of the source.
        ignored: those of them that no parameter needs.
        notes: passed on.
        more: puts further files (tokenizer) into the directory that it is given.

    Raises:
        OutputError: the destination exists or cannot be written.
        SourceError: the parts are not exactly the model's parameters, or leave source tensors over.
    """
    target = Path(os.path.abspath(destination))
    check_vacant(target)
    _check(config, parts, stored, ignored)
    with staged(target, "import") as work, writing(target):
        config.save_pretrained(work)
        more(work)
        _write_shards(work, parts)
    used = sorted({s for p in parts.values() for s in p.sources})
    total = sum(math.prod(p.shape) for p in parts.values())
    return Imported(target, total, tuple(used), tuple(sorted(ignored & stored)), notes)


def _check(config: Any, parts: dict[str, Part], stored: set[str], ignored: set[str]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    expected = {n: tuple(p.shape) for n, p in model.named_parameters() if n not in tied}
    for name in sorted(set(expected) - set(parts)):
        raise SourceError(
            f"the source has nothing for {name} {list(expected[name])}; it is incomplete or of "
            "another layout"
        )
    for name, part in sorted(parts.items()):
        if name not in expected:
            raise SourceError(
                f"{', '.join(part.sources)!r} has no place in the model (as {name}); the layout "
                "is not supported"
            )
        if part.shape != expected[name]:
            raise SourceError(
                f"{', '.join(part.sources)!r} gives {name} the shape {list(part.shape)}, the "
                f"model needs {list(expected[name])}"
            )
    left = stored - ignored - {s for p in parts.values() for s in p.sources}
    if left:
        raise SourceError(
            f"{len(left)} tensors of the source have no place in the model, {min(left)!r} first; "
            "the layout is not supported"
        )


def _write_shards(directory: Path, parts: dict[str, Part]) -> None:
    size = {n: math.prod(p.shape) * p.dtype.itemsize for n, p in parts.items()}
    groups: list[list[str]] = [[]]
    for name in parts:
        if groups[-1] and sum(size[n] for n in groups[-1]) + size[name] > SHARD_BYTES:
            groups.append([])
        groups[-1].append(name)
    where: dict[str, str] = {}
    for i, group in enumerate(groups, 1):
        file = (
            f"model-{i:05d}-of-{len(groups):05d}.safetensors"
            if len(groups) > 1
            else "model.safetensors"
        )
        write_tensors(
            directory / file,
            {
                n: Streamed(parts[n].dtype, parts[n].shape, partial(_chunks, n, parts[n]))
                for n in group
            },
        )
        where.update(dict.fromkeys(group, file))
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": where}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _chunks(name: str, part: Part) -> Iterator[memoryview]:
    """The bytes of a tensor, if the source has the number and the type of values that it should."""
    size, written = math.prod(part.shape) * part.dtype.itemsize, 0
    for piece in part.pieces():
        if piece.dtype != part.dtype:
            raise SourceError(
                f"{name}: the source mixes {part.dtype} and {piece.dtype}; convert it to one dtype "
                "first"
            )
        written += piece.nbytes
        if written <= size:
            yield tensor_bytes(piece)
    if written != size:
        raise SourceError(
            f"{name}: {written} bytes came from {', '.join(part.sources)}, expected {size}"
        )
