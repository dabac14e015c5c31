"""The encoded form of one experts module: a flat stream of bytes and where each matrix lies in it.

``offsets[e, j] = (tables begin, tables end, matrix begin, matrix end)`` in bytes of the stream,
for expert e and projection j. Nothing is believed before it is checked. Knows nothing about files,
models or devices.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qmoe import codec
from qmoe.errors import CorruptError
from qmoe.types import ExpertsLayout


def bad_range(offsets: Tensor, n: int) -> tuple[tuple[int, int], str] | None:
    """The first invalid byte range of `offsets` [a, b, 4] into a stream of n bytes: its index and
    what it says; None if all are valid.
    """
    begin, end = offsets[..., 0::2], offsets[..., 1::2]
    bad = (begin < 0) | (end <= begin) | (end > n) | (begin % 4 != 0) | (end % 4 != 0)
    if not bad.any():
        return None
    i, j, part = bad.nonzero()[0].tolist()
    return (i, j), f"bytes {int(begin[i, j, part])} to {int(end[i, j, part])} of a stream of {n}"


def check_offsets(layout: ExpertsLayout, offsets: Tensor, n: int) -> None:
    """Whether `offsets` fits the layout and a stream of n bytes.

    Raises:
        CorruptError: with the module and the offending values.
    """
    want = (layout.experts, len(layout.projections), 4)
    if offsets.dtype != torch.int64 or tuple(offsets.shape) != want:
        found = f"{offsets.dtype} {tuple(offsets.shape)}"
        raise CorruptError(f"{layout.path}.offsets is {found}, expected {want}")
    bad = bad_range(offsets, n)
    if bad is not None:
        (e, j), span = bad
        raise CorruptError(f"{layout.path} expert {e} {layout.projections[j].name}: {span}")


def used_runs(offsets: Tensor) -> tuple[list[tuple[int, int]], Tensor]:
    """The bytes that some matrices use, as few runs, and where the matrices lie if only these runs
    are kept, one behind the other.

    Args:
        offsets: int64 [..., 4], valid.

    Returns:
        Ascending disjoint (begin, end), and offsets of the same shape into the runs joined.
    """
    pairs = offsets.reshape(-1, 2)
    runs: list[list[int]] = []
    for begin, end in sorted({(int(a), int(b)) for a, b in pairs}):
        if runs and begin <= runs[-1][1]:
            runs[-1][1] = max(runs[-1][1], end)
        else:
            runs.append([begin, end])
    begins = torch.tensor([a for a, _ in runs], dtype=torch.int64)
    sizes = torch.tensor([b - a for a, b in runs], dtype=torch.int64)
    moved = begins - (sizes.cumsum(0) - sizes)  # how far each run moves towards the front
    at = torch.searchsorted(begins, pairs[:, 0].contiguous(), right=True) - 1
    return [(a, b) for a, b in runs], (pairs - moved[at][:, None]).reshape(offsets.shape)


@dataclass(frozen=True)
class StoredExperts:
    """Streams of the matrices of one experts module.

    Attributes:
        layout: geometry that the streams must have.
        stream: uint8 [n], on the CPU.
        offsets: int64 [experts, projections, 4], on the CPU.
    """

    layout: ExpertsLayout
    stream: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        """Checks types, shapes and every range.

        Raises:
            CorruptError: with the module and the offending values.
        """
        if self.stream.dtype != torch.uint8 or self.stream.ndim != 1:
            found = f"{self.stream.dtype} {tuple(self.stream.shape)}"
            raise CorruptError(f"{self.layout.path}.stream is {found}")
        check_offsets(self.layout, self.offsets, self.stream.numel())

    def tables_at(self, expert: int, projection: int) -> tuple[int, int]:
        """Byte range of the tables that a matrix uses; equal ranges are the same tables."""
        begin, end = self.offsets[expert, projection, :2].tolist()
        return begin, end

    def tables(self, expert: int, projection: int) -> codec.Tables:
        """Parses the tables of a matrix.

        Raises:
            CorruptError: the bytes are not valid tables.
        """
        begin, end = self.tables_at(expert, projection)
        try:
            return codec.parse_tables(self.stream[begin:end])
        except CorruptError as e:
            raise CorruptError(f"{self._name(expert, projection)}: {e}") from e

    def matrix(self, expert: int, projection: int, tables: codec.Tables) -> codec.ParsedMatrix:
        """Parses one matrix, walking its streams to their ends, and compares its shape.

        Args:
            expert: index.
            projection: index in the layout.
            tables: from `tables`.

        Raises:
            CorruptError: the bytes are not a valid matrix of that shape.
        """
        begin, end = self.offsets[expert, projection, 2:].tolist()
        want = self.layout.projections[projection]
        try:
            found = codec.parse_matrix(tables, self.stream[begin:end])
        except CorruptError as e:
            raise CorruptError(f"{self._name(expert, projection)}: {e}") from e
        if (found.rows, found.cols) != (want.rows, want.cols):
            raise CorruptError(
                f"{self._name(expert, projection)} is {found.rows} x {found.cols}, "
                f"config.json says {want.rows} x {want.cols}"
            )
        return found

    def dense(self, expert: int, projection: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decodes one matrix [rows, cols] in float32 or bfloat16."""
        tables = self.tables(expert, projection)
        return codec.decode_dense(tables, self.matrix(expert, projection, tables), dtype)

    def _name(self, expert: int, projection: int) -> str:
        return f"{self.layout.path} expert {expert} {self.layout.projections[projection].name}"
