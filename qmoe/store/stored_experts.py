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
        path, n = self.layout.path, self.stream.numel()
        want = (self.layout.experts, len(self.layout.projections), 4)
        if self.stream.dtype != torch.uint8 or self.stream.ndim != 1:
            raise CorruptError(f"{path}.stream is {self.stream.dtype} {tuple(self.stream.shape)}")
        if self.offsets.dtype != torch.int64 or tuple(self.offsets.shape) != want:
            found = f"{self.offsets.dtype} {tuple(self.offsets.shape)}"
            raise CorruptError(f"{path}.offsets is {found}, expected {want}")
        bad = bad_range(self.offsets, n)
        if bad is not None:
            (e, j), span = bad
            raise CorruptError(f"{path} expert {e} {self.layout.projections[j].name}: {span}")

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
