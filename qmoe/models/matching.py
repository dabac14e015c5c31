"""Compares tensor names and shapes on disk with the model's parameters: missing, doubled,
misnumbered, too small. Reads no weights.

Knows nothing about how weights are converted or loaded.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.errors import QmoeError, SourceError
from qmoe.models.families.find import KINDS
from qmoe.models.ties import Sources, tied_names
from qmoe.types import ExpertsLayout

_SMALL = 2**26  # bytes of tables that any model may have
EXPERT_NUMBER = re.compile(r"experts?[._](\d+)\.")


def check_complete(where: str, model: nn.Module, sources: Sources, several: Iterable[str]) -> None:
    """Every parameter and persistent buffer of the model is on disk.

    Args:
        where: the checkpoint, for messages.
        model: on any device.
        sources: where the parameters come from.
        several: target patterns of converters that fill several parameters (a fused qkv on disk);
            `sources` names only the first of them.

    Raises:
        SourceError: with the first parameter that is missing.
    """
    ties = tied_names(model)
    there = {pair[1] for pair in ties if not sources.keys().isdisjoint(pair)}
    tied = {n for pair in ties if pair[1] in there for n in pair}
    patterns = [re.compile(t.replace("*", r"\d+")) for t in several]
    missing = [
        n
        for n in model.state_dict()
        if n not in sources and n not in tied and not any(p.search(n) for p in patterns)
    ]
    if missing:
        raise SourceError(
            f"{where}: no tensor on disk for {missing[0]} ({len(missing)} tensors of "
            f"{type(model).__name__} are missing); the checkpoint is incomplete or does not match "
            "config.json"
        )


def check_sizes(
    where: str, model: nn.Module, sources: Sources, shape: Callable[[str], tuple[int, ...]]
) -> None:
    """No parameter is larger than what is on disk for it, or empty where that is not: a size of
    config.json that no file supports is refused before anything of that size is made.

    Args:
        where: the checkpoint, for messages.
        model: on the meta device.
        sources: where the parameters come from.
        shape: of a tensor on disk.

    Raises:
        SourceError: with the first parameter of another size.
    """
    for target, tensor in model.state_dict().items():
        wanted, disks = tuple(tensor.shape), sources.get(target, {})
        shapes = [tuple(shape(disk)) for disk in disks]
        if list(disks.values()) == [None]:
            wrong, there = shapes[0] != wanted, f"shape {shapes[0]}"
        else:
            most = max(map(math.prod, shapes), default=0)  # an odd one is named where it is read
            wrong = bool(disks) and not min(most, 1) <= math.prod(wanted) <= most * len(disks)
            there = f"{len(disks)} tensors of at most {most} values"
        if wrong:
            raise SourceError(
                f"{where}: {target} has {there} on disk, config.json asks for {wanted}; "
                "the checkpoint does not match its config"
            )


def check_tables(
    where: str | Path, model: nn.Module, weights: int, error: type[QmoeError] = SourceError
) -> None:
    """What the model computes once and no file holds (rotary tables, position embeddings) is not
    larger than the weights.

    Args:
        where: the checkpoint, for messages.
        model: on the meta device.
        weights: bytes of all weights.
        error: raised, with the largest table.
    """
    stored = model.state_dict().keys()
    tables = {n: b for n, b in model.named_buffers() if n not in stored}
    total = sum(b.nbytes for b in tables.values())
    if total > max(weights, _SMALL):
        name = max(tables, key=lambda n: tables[n].nbytes)
        raise error(
            f"{where}: config.json asks for tables of {total} bytes beside weights of {weights}, "
            f"{name} of shape {tuple(tables[name].shape)} among them; correct its sizes"
        )


def check_dtypes(
    where: str, model: nn.Module, sources: Sources, dtype: Callable[[str], torch.dtype]
) -> None:
    """Floating point numbers on disk where the model has them: integers are the words of a
    quantized checkpoint whose settings are lost.

    Args:
        where: the checkpoint, for messages.
        model: on any device.
        sources: where the parameters come from.
        dtype: of a tensor on disk.

    Raises:
        SourceError: with the first tensor that holds integers.
    """
    for target, tensor in model.state_dict().items():
        for disk in sources.get(target, ()) if tensor.is_floating_point() else ():
            if not dtype(disk).is_floating_point:
                raise SourceError(
                    f"{where}: {disk} holds {str(dtype(disk)).removeprefix('torch.')} where the "
                    "model has floating point weights; if it is quantized, config.json lacks its "
                    "quantization_config"
                )


def shared_lists(
    experts: Iterable[tuple[ExpertsLayout, Any]], sources: Sources
) -> dict[str, list[str]]:
    """Which experts modules are one numbered list on disk (the text and the vision experts of a
    layer, say).

    Returns:
        parameter -> the parameters of different modules that its list fills, in the order of the
        numbers: each module takes as many as it has experts, and the next one goes on. Parameters
        that have a list of their own are left out.
    """
    modules = {
        f"{layout.path}.{name}": layout.path
        for layout, module in experts
        for name in KINDS[layout.kind].encoded(module)
    }
    fed: dict[str, list[str]] = {}
    for target, disks in sources.items():
        if target in modules and any(EXPERT_NUMBER.search(disk) for disk in disks):
            fed.setdefault(min(disks), []).append(target)
    several = [t for t in fed.values() if len({modules[n] for n in t}) == len(t) > 1]
    return {target: targets for targets in several for target in targets}


def check_experts(
    where: str,
    experts: Iterable[tuple[ExpertsLayout, Any]],
    sources: Sources,
    shared: Mapping[str, list[str]],
) -> None:
    """One layout on disk for every experts module, and as many experts as config.json says.

    Args:
        where: the checkpoint, for messages.
        experts: the experts modules.
        sources: where their parameters come from.
        shared: see `shared_lists`.

    Raises:
        SourceError: with the parameter and what is on disk.
    """
    for layout, module in experts:
        for name in KINDS[layout.kind].encoded(module):
            target = f"{layout.path}.{name}"
            disks = sources.get(target, {})
            if len(disks) > 1 and None in disks.values():
                raise SourceError(
                    f"{where}: {target} is on disk in two layouts, as {min(disks)} and as "
                    f"{max(disks)}; remove one of them"
                )
            numbers: dict[str, set[int]] = {}
            for disk, pattern in disks.items():
                found = EXPERT_NUMBER.search(disk)
                if found and pattern is not None:
                    numbers.setdefault(pattern, set()).add(int(found.group(1)))
            count = layout.experts * len(shared.get(target, [target]))
            for seen in numbers.values():
                if seen != set(range(count)):
                    raise SourceError(
                        f"{where}: {len(seen)} tensors (numbers {min(seen)} to {max(seen)}) for "
                        f"the {count} experts of {target}; the checkpoint does not match "
                        "config.json"
                    )


def read_part(
    where: str, layout: ExpertsLayout, expert: int, read: Callable[[], Mapping[str, Tensor]]
) -> Mapping[str, Tensor]:
    """One expert's matrices, as wide and high as its module has them.

    Args:
        where: the checkpoint, for messages.
        layout: of the experts module.
        expert: index.
        read: cuts the matrices, by projection, out of what is on disk.

    Raises:
        SourceError: they have other shapes.
    """
    unlike = "the checkpoint does not match its config"
    try:
        matrices = read()
    except (LookupError, RuntimeError, ValueError) as e:
        raise SourceError(
            f"{where}: expert {expert} of {layout.path} cannot be cut out of the tensors on disk "
            f"({e}); {unlike}"
        ) from e
    for p in layout.projections:
        shape = tuple(matrices[p.name].shape)
        if shape != (p.rows, p.cols):
            raise SourceError(
                f"{where}: expert {expert} of {layout.path} has a {p.name} matrix of shape "
                f"{shape}, config.json asks for {(p.rows, p.cols)}; {unlike}"
            )
    return matrices
