"""``--source-cache drop``: which downloaded files of a source a run still needs.

A walk through the model reads its blocks in order, and everything else is read before or after it.
So a file can go as soon as no block ahead needs it, and one that only a block far ahead needs (that
of the head, which the last block shares with it) goes and comes again. Local sources and the hub's
own cache are never touched: for them all this does nothing.
"""

from collections.abc import Iterable

from qmoe.models.streamed import BlockRef, StreamedModel
from qmoe.system.processes import World

_HERE = 2  # blocks whose files are on the disk: the one that is worked on, and the next, read ahead


def begin_walk(
    streamed: StreamedModel, blocks: Iterable[BlockRef], world: World | None = None
) -> None:
    """Says which blocks will be read from now on.

    Args:
        streamed: the model and its open source.
        blocks: in their order.
        world: the processes that share the directory, all of which call this: they wait for each
            other, so that none still reads what was expected before, and the first deletes for
            all. None: nobody else reads now.
    """
    if world is not None:
        world.meet("start of a walk")
    blocks = list(blocks)
    soon = _tensors(streamed, blocks[:_HERE])
    mine = world is None or world.first
    streamed.checkpoint.expect(_tensors(streamed, blocks), mine, soon)


def leave(streamed: StreamedModel, block: BlockRef) -> None:
    """Says that no process needs a block any more in this walk."""
    streamed.checkpoint.finished(_tensors(streamed, [block]))


def _tensors(streamed: StreamedModel, blocks: Iterable[BlockRef]) -> list[str]:
    """Names in the source."""
    inside = tuple(f"{block.name}." for block in blocks)
    found = (disks for target, disks in streamed.sources.items() if target.startswith(inside))
    return [disk for disks in found for disk in disks]
