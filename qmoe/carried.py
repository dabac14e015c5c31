"""Tensors of the source that no module of the model takes: multi-token-prediction layers, the
vision tower of a model that is loaded as its text part.

They are stored unchanged, under their names in the source, in shards of their own. The index that
transformers reads does not list them; the manifest does, so that `verify` covers them and `export`
writes them back. Knows nothing about what they mean.
"""

from collections import Counter
from collections.abc import Collection
from typing import Any

from qmoe.container import CARRIED_BLOCK, ContainerWriter
from qmoe.families.layouts import KINDS
from qmoe.host import Host


def write_carried(writer: ContainerWriter, host: Host, finished: Collection[str]) -> list[str]:
    """Copies what no module takes, one tensor at a time.

    Args:
        writer: of the compressed checkpoint.
        host: the model and its open source.
        finished: blocks that an earlier run left.

    Returns:
        The names of the blocks written: one, or none if every tensor has a module.
    """
    if not host.unused:
        return []
    if CARRIED_BLOCK not in finished:
        source = host.checkpoint
        source.expect(host.unused)
        with writer.block(CARRIED_BLOCK) as block:
            for name in source.in_file_order(host.unused):
                block.add_tensor(name, source.read(name))
                source.finished([name])
    return [CARRIED_BLOCK]


def account(host: Host) -> dict[str, Any]:
    """What becomes of every tensor of the source.

    Returns:
        {"coded": source tensors whose values are in the experts' streams, "kept": those of dense
        parameters, "carried": those that no module takes}; together they are all of them.
    """
    encoded = {
        f"{layout.path}.{name}"
        for layout, module in host.experts
        for name in KINDS[layout.kind].encoded(module)
    }
    fate = {name: "carried" for name in host.unused}
    for target, disks in host.sources.items():
        fate |= dict.fromkeys(disks, "coded" if target in encoded else "kept")
    if lost := set(host.checkpoint.names()) - fate.keys():
        raise ValueError(f"tensors of the source are unaccounted for: {sorted(lost)[:3]}")
    return {"coded": 0, "kept": 0, "carried": 0, **Counter(fate.values())}
