"""Tensors of the source that no module of the model takes: multi-token-prediction layers, the
vision tower of a model that is loaded as its text part.

They are stored as they are in the source's files, bytes, dtype and name; a quantized one in its
parts, words and scales. The index that transformers reads does not list them; the manifest does, so
that `verify` covers them and `export` writes them back. Knows nothing about what they mean.
"""

from collections import Counter
from collections.abc import Collection
from math import prod
from typing import Any

from qmoe.models.families.find import KINDS
from qmoe.models.streamed import StreamedModel
from qmoe.source.checkpoint import CARRIED_SETTINGS, Checkpoint
from qmoe.store.writer import CARRIED_BLOCK, ContainerWriter


def write_carried(
    writer: ContainerWriter, streamed: StreamedModel, finished: Collection[str]
) -> list[str]:
    """Copies what no module takes, one tensor at a time. If any of it is quantized, the source's
    settings go into the model's configuration: without them the bytes mean nothing.

    Args:
        writer: of the compressed checkpoint.
        streamed: the model and its open source.
        finished: blocks that an earlier run left.

    Returns:
        The names of the blocks written: one, or none if every tensor has a module.
    """
    if not streamed.unused:
        return []
    checkpoint = streamed.checkpoint
    if any(checkpoint.parts(name) != (name,) for name in streamed.unused):
        setattr(streamed.config, CARRIED_SETTINGS, checkpoint.settings)
    if CARRIED_BLOCK not in finished:
        stored = _stored(checkpoint, streamed.unused)
        checkpoint.expect(stored)
        with writer.block(CARRIED_BLOCK) as block:
            for name in checkpoint.in_file_order(stored):
                block.add_tensor(name, checkpoint.read_stored(name))
                checkpoint.finished([name])
    return [CARRIED_BLOCK]


def _stored(checkpoint: Checkpoint, unused: Collection[str]) -> list[str]:
    """The names of unused tensors in the source's files, scales of activations beside them
    included."""
    names = {part for name in unused for part in checkpoint.parts(name)}
    modules = {_module(name) for name in unused}
    return sorted(names.union(n for n in checkpoint.aside() if _module(n) in modules))


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def account(streamed: StreamedModel) -> dict[str, Any]:
    """What becomes of every tensor in the files of the source.

    Returns:
        {"tensors": {"coded": how many are in the experts' streams, "kept": in dense parameters,
        "carried": stored as they are, "left out": scales of activations, of which a model that
        computes with dense activations has no use}, "carried_weights": weights of the carried
        ones}.
    """
    checkpoint = streamed.checkpoint
    encoded = {
        f"{layout.path}.{name}"
        for layout, module in streamed.experts
        for name in KINDS[layout.kind].encoded(module)
    }
    fate = dict.fromkeys(checkpoint.aside(), "left out")
    for target, disks in streamed.sources.items():
        for disk in disks:
            what = "coded" if target in encoded else "kept"
            fate |= dict.fromkeys(checkpoint.parts(disk), what)
    fate |= dict.fromkeys(_stored(checkpoint, streamed.unused), "carried")
    if lost := set(checkpoint.stored_names()) - fate.keys():
        raise ValueError(f"tensors of the source are unaccounted for: {sorted(lost)[:3]}")
    return {
        "tensors": {"coded": 0, "kept": 0, "carried": 0, "left out": 0, **Counter(fate.values())},
        "carried_weights": sum(prod(checkpoint.shape(name)) for name in streamed.unused),
    }
