"""What single experts got: stored bits, and tokens of the calibration text. Decodes no weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qmoe.errors import CorruptError
from qmoe.store.reader import Container
from qmoe.store.stored_experts import bad_range

FEW_TOKENS = 64  # below this an expert is called starved in the report
FLOOR = 0.1  # stored bits per weight below which an expert is all but erased
SCANT = 0.1  # of an equal share of the text's tokens


@dataclass(frozen=True)
class Coverage:
    """Of all experts modules together.

    Attributes:
        bits_as_read: stored bits per weight of the experts that a token of the text reads, on
            average; None if no tokens are recorded.
        below_floor: experts of fewer than FLOOR bits, {module: their numbers}, modules without any
            left out.
        without_tokens, starved, scant: experts that saw no token of the text; some, but fewer than
            FEW_TOKENS; fewer than SCANT of what each would see if all were used alike. None if not
            recorded.
    """

    bits_as_read: float | None
    below_floor: Mapping[str, Sequence[int]]
    without_tokens: int | None
    starved: int | None
    scant: int | None

    @property
    def floor_count(self) -> int:
        """Experts of fewer than FLOOR bits."""
        return sum(len(experts) for experts in self.below_floor.values())

    def floor_text(self, most: int = 6) -> list[str]:
        """A line that names the experts below the floor, of so many modules at most; none if there
        are none.
        """
        if not self.below_floor:
            return []
        named = [
            f"{path} ({', '.join(map(str, experts))})"
            for path, experts in list(self.below_floor.items())[:most]
        ]
        rest = len(self.below_floor) - len(named)
        more = f" and of {rest} more modules" if rest else ""
        names = ", ".join(named)
        return [f"{self.floor_count} experts have less than {FLOOR:g} bit: {names}{more}"]


def expert_bits(container: Container, path: str) -> Tensor:
    """Stored bits per weight of every expert of a module, float64 [experts]; what the experts
    share, tables and offsets, is divided among them equally.

    Raises:
        CorruptError: offsets that are not valid.
    """
    layout = container.modules[path]
    offsets = container.read(f"{path}.offsets")
    if bad := bad_range(offsets, container.tensors[f"{path}.stream"][2].shape[0]):
        raise CorruptError(f"{path}: {bad[1]}")
    own = (offsets[:, :, 3] - offsets[:, :, 2]).sum(1).double()
    stream = container.tensors[f"{path}.stream"][2]
    shared = stream.end - stream.begin - own.sum() + offsets.numel() * offsets.element_size()
    return 8 * (own + shared / layout.experts) * layout.experts / layout.weights


def coverage(container: Container) -> Coverage:
    """Reads the offsets of every experts module and the tokens in the manifest.

    Raises:
        CorruptError: offsets that cannot be read.
    """
    reports: dict[str, Any] = container.manifest["report"]["modules"]
    below: dict[str, list[int]] = {}
    read = weights = 0.0
    tokens: list[int] = []
    scant = 0
    for path, layout in container.modules.items():
        bits = expert_bits(container, path)
        if len(few := (bits < FLOOR).nonzero().flatten().tolist()):
            below[path] = few
        seen = reports[path]["tokens"]
        if seen is None:
            continue
        tokens += seen
        scant += sum(n < SCANT * sum(seen) / layout.experts for n in seen)
        size = layout.weights / layout.experts
        read += sum(n * size * b for n, b in zip(seen, bits.tolist(), strict=True))
        weights += sum(seen) * size
    known = bool(tokens)
    return Coverage(
        bits_as_read=read / weights if weights else None,
        below_floor=below,
        without_tokens=tokens.count(0) if known else None,
        starved=sum(0 < n < FEW_TOKENS for n in tokens) if known else None,
        scant=scant if known else None,
    )
