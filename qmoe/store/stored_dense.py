"""The encoded form of one dense matrix (a Linear's weight, an embedding table): bands of rows, each
coded by itself.

A band is the sum of one or two *planes*, each a matrix of the codec: rates above what 8-bit
integers reach take a second plane that refines the first. Two tensors hold the bytes, the stream
and ``offsets[band, plane] = (tables begin, tables end, matrix begin, matrix end)``. Nothing is
believed before it is checked. Knows nothing about files, models or devices.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qmoe import codec
from qmoe.codec.format.geometry import MAX_COLS, MAX_ROWS
from qmoe.errors import CorruptError
from qmoe.store.stored_experts import bad_range

STREAM, OFFSETS = "dense_stream", "dense_offsets"  # last parts of the names of the two tensors
MAX_PLANES = 2
_MAX_WEIGHTS = 1 << 48


@dataclass(frozen=True)
class DenseGeometry:
    """Shape of an encoded dense matrix.

    Attributes:
        name: parameter of the model, e.g. "lm_head.weight".
        rows, cols: of the parameter.
        band: rows of every band but the last, which has the rest.
        planes: matrices whose sum is a band.
    """

    name: str
    rows: int
    cols: int
    band: int
    planes: int

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.cols

    @property
    def bands(self) -> list[range]:
        """Rows of each band."""
        starts = range(0, self.rows, self.band)
        return [range(s, min(s + self.band, self.rows)) for s in starts]

    @property
    def offsets_shape(self) -> tuple[int, int, int]:
        """Shape of the offsets."""
        return -(-self.rows // self.band), self.planes, 4

    @property
    def tensors(self) -> tuple[str, str]:
        """Names of the stream and of the offsets."""
        return f"{self.name}.{STREAM}", f"{self.name}.{OFFSETS}"

    def as_json(self) -> dict[str, int]:
        """The entry of config.json."""
        return {"rows": self.rows, "cols": self.cols, "band": self.band, "planes": self.planes}


def parse_dense(raw: Any) -> dict[str, DenseGeometry]:
    """``quantization_config.dense``: geometry by parameter name; absent means none.

    Raises:
        CorruptError: with the parameter and the entry.
    """
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise CorruptError(f"config.json: quantization_config.dense is a {type(raw).__name__}")
    return {name: _parse(name, entry) for name, entry in raw.items()}


def _parse(name: str, raw: Any) -> DenseGeometry:
    text = f"config.json: geometry of {name} is {raw!r}"[:500]
    try:
        sizes = [raw[key] for key in ("rows", "cols", "band", "planes")]
    except (KeyError, TypeError) as e:
        raise CorruptError(text) from e
    if any(type(n) is not int or n < 1 for n in sizes):
        raise CorruptError(text)
    geometry = DenseGeometry(name, *sizes)
    if (
        geometry.weights > _MAX_WEIGHTS
        or geometry.cols > MAX_COLS
        or geometry.band > min(geometry.rows, MAX_ROWS)
        or geometry.planes > MAX_PLANES
    ):
        raise CorruptError(text)
    return geometry


@dataclass(frozen=True)
class StoredMatrix:
    """Streams of one dense matrix.

    Attributes:
        geometry: that the streams must have.
        stream: uint8 [n], on the CPU.
        offsets: int64 [bands, planes, 4], on the CPU.
    """

    geometry: DenseGeometry
    stream: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        """Checks types, shapes and every range.

        Raises:
            CorruptError: with the parameter and the offending values.
        """
        name, want = self.geometry.name, self.geometry.offsets_shape
        for t, dtype, shape in (
            (self.stream, torch.uint8, (self.stream.numel(),)),
            (self.offsets, torch.int64, want),
        ):
            if t.dtype != dtype or tuple(t.shape) != shape:
                found = f"{t.dtype} {tuple(t.shape)}"
                raise CorruptError(f"{name}: {found} is stored, expected {dtype} {shape}")
        bad = bad_range(self.offsets, self.stream.numel())
        if bad is not None:
            (band, plane), span = bad
            raise CorruptError(f"{name} band {band} plane {plane}: {span}")

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [rows, cols]: float32 sums of the planes, then rounded to `dtype`.

        Raises:
            CorruptError: a blob that does not decode or has another shape, or a weight that is not
                finite.
        """
        g = self.geometry
        out = torch.empty(g.rows, g.cols, dtype=dtype)
        for i, rows in enumerate(g.bands):
            total = self._plane(i, 0, len(rows))
            for plane in range(1, g.planes):
                total += self._plane(i, plane, len(rows))
            if not torch.isfinite(total).all():
                raise CorruptError(f"{g.name} band {i} is not finite")
            out[rows.start : rows.stop] = total
        return out

    def integers(self) -> codec.Integers:
        """The matrix as it is stored, if it has one plane.

        Raises:
            CorruptError: a blob that does not decode, has another shape or scales of negative
                weights, which no dense matrix has.
        """
        g = self.geometry
        bands = []
        for i, rows in enumerate(g.bands):
            tables, matrix = self._parse(i, 0, len(rows))
            bands.append(codec.decode_codes(tables, matrix))
            if bands[-1].row_scale_neg is not None:
                raise CorruptError(f"{g.name} band {i} has scales of negative weights")
        return codec.Integers.of(bands)

    def _plane(self, band: int, plane: int, rows: int) -> Tensor:
        return codec.decode_dense(*self._parse(band, plane, rows))

    def _parse(self, band: int, plane: int, rows: int) -> tuple[codec.Tables, codec.ParsedMatrix]:
        a, b, c, d = self.offsets[band, plane].tolist()
        try:
            tables = codec.parse_tables(self.stream[a:b])
            layout = codec.parse_matrix(tables, self.stream[c:d])
            found, want = (layout.rows, layout.cols), (rows, self.geometry.cols)
            if found != want:
                raise CorruptError(f"shape {found}, config.json says {want}")
            return tables, layout
        except CorruptError as e:
            raise CorruptError(f"{self.geometry.name} band {band} plane {plane}: {e}") from e
