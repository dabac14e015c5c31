"""Products with integers of 8 bits that lie in memory as they are: for matrices that every token
reads, which a stream would be decoded for each time.

A weight is ``(code * column scale) * row scale``; the column scales go into the input, so that the
loop adds ``code * x`` in float32.
"""

from dataclasses import dataclass
from typing import Any

import numba as nb
import torch
import torch.nn.functional as F
from torch import Tensor

from qmoe.codec.decoder import threads
from qmoe.codec.decoder.lanes import weights_along
from qmoe.codec.decoder.registers import (
    COUNT,
    fused,
    load_bytes,
    load_floats,
    prefetch,
    total,
    zeros,
)
from qmoe.codec.decoder.room import kept_room
from qmoe.codec.format.arrays import F32, I8, U16, U32
from qmoe.types import QuantizedMatrix, grid_scale

STEP = 2 * COUNT  # columns must be a multiple of it
_CHUNK = 64  # rows of a piece of work
_AHEAD = 4096  # bytes: a processor's own prefetching stops at the end of a page
_BITS = {torch.float32: torch.uint32, torch.bfloat16: torch.uint16}


@dataclass(frozen=True)
class Integers:
    """Bands of rows, each with column scales of its own.

    Attributes:
        codes: int8 [rows, cols].
        row_index: int16 [rows], col_index: int16 [bands, cols], scales' places on the grid.
        band: rows of every band but the last.
    """

    codes: Tensor
    row_index: Tensor
    col_index: Tensor
    band: int

    @classmethod
    def of(cls, bands: list[QuantizedMatrix]) -> "Integers":
        """From bands without negative row scales."""
        return cls(
            torch.cat([b.codes for b in bands]),
            torch.cat([b.row_scale for b in bands]),
            torch.stack([b.col_scale for b in bands]),
            len(bands[0].codes),
        )

    def dense(self, dtype: torch.dtype, room: Tensor | None = None) -> Tensor:
        """The weights [rows, cols], where the codes are: exact in float32, then rounded.

        Args:
            dtype: of the weights.
            room: uint8 [n], where they are put; None takes new memory. Only float32 or bfloat16 on
                the CPU.
        """
        whole = self.codes.shape[1] % COUNT == 0
        if self.codes.device.type == "cpu" and dtype in _BITS and whole:
            size = self.codes.numel() * dtype.itemsize
            room = torch.empty(size, dtype=torch.uint8) if room is None else room
            out = room[:size].view(dtype).view(self.codes.shape)
            scales = grid_scale(self.row_index).numpy(), grid_scale(self.col_index).numpy()
            bits = out.view(_BITS[dtype]).numpy()
            arguments = (self.codes.numpy(), *scales, self.band, bits)
            threads.run(_weights_alone, _weights_shared, arguments, self.codes.numel())
            return out
        out = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        for i, col in enumerate(grid_scale(self.col_index)):
            rows = slice(i * self.band, (i + 1) * self.band)
            row = grid_scale(self.row_index[rows])
            out[rows] = self.codes[rows].float() * col * row[:, None]
        return out

    def dense_product(self, x: Tensor) -> Tensor:
        """``x @ W.T`` by torch, the weights decoded for the time of the call."""
        if self.codes.device.type != "cpu" or x.dtype not in _BITS:
            return F.linear(x, self.dense(x.dtype))
        return F.linear(x, self.dense(x.dtype, kept_room(self.codes.numel() * x.dtype.itemsize)))

    def product(self, x: Tensor) -> Tensor:
        """``x @ W.T``: float32 [n, cols] -> float32 [n, rows], on the CPU; columns are a multiple
        of `STEP`. A row of the result does not depend on the others, nor on threads."""
        scaled = (x * grid_scale(self.col_index)[:, None]).contiguous()  # [bands, n, cols]
        out = torch.empty(len(self.codes), len(x))
        arguments = (self.codes.numpy(), scaled.numpy(), self.band, out.numpy())
        threads.run(_alone, _shared, arguments, self.codes.numel())
        return (out * grid_scale(self.row_index)[:, None]).T


@nb.njit(cache=True, nogil=True)
def _alone(codes: I8, x: F32, band: int, out: F32) -> None:
    for first in range(0, len(codes), _CHUNK):
        _rows(codes, x, band, first, min(first + _CHUNK, len(codes)), out)


@nb.njit(cache=True, nogil=True, parallel=True)
def _shared(codes: I8, x: F32, band: int, out: F32) -> None:
    for c in nb.prange((len(codes) + _CHUNK - 1) // _CHUNK):
        _rows(codes, x, band, c * _CHUNK, min((c + 1) * _CHUNK, len(codes)), out)


@nb.njit(cache=True, nogil=True)
def _rows(codes: I8, x: F32, band: int, first: int, end: int, out: F32) -> None:
    cols, n = codes.shape[1], x.shape[1]
    for row in range(first, end):
        inputs = x[row // band]
        line = codes[row]
        for k in range(0, n - 3, 4):
            a0, a1, a2, a3 = zeros(), zeros(), zeros(), zeros()
            b0, b1, b2, b3 = zeros(), zeros(), zeros(), zeros()
            x0, x1, x2, x3 = inputs[k], inputs[k + 1], inputs[k + 2], inputs[k + 3]
            for j in range(0, cols, STEP):
                h = j + COUNT
                if k == 0:
                    prefetch(line, j + _AHEAD)
                low, high = load_bytes(line, j), load_bytes(line, h)
                a0, b0 = fused(low, load_floats(x0, j), a0), fused(high, load_floats(x0, h), b0)
                a1, b1 = fused(low, load_floats(x1, j), a1), fused(high, load_floats(x1, h), b1)
                a2, b2 = fused(low, load_floats(x2, j), a2), fused(high, load_floats(x2, h), b2)
                a3, b3 = fused(low, load_floats(x3, j), a3), fused(high, load_floats(x3, h), b3)
            out[row, k], out[row, k + 1] = total(a0) + total(b0), total(a1) + total(b1)
            out[row, k + 2], out[row, k + 3] = total(a2) + total(b2), total(a3) + total(b3)
        for k in range(n - n % 4, n):
            out[row, k] = _dot(line, inputs[k], _AHEAD if k == 0 else 0)


@nb.njit(inline="always")
def _dot(line: I8, x: F32, ahead: int) -> Any:
    """line . x, asking for the bytes that lie `ahead`."""
    a, b = zeros(), zeros()
    whole = len(line) - len(line) % (2 * STEP)
    for j in range(0, whole, 2 * STEP):  # a cache line of codes
        prefetch(line, j + ahead)
        a = fused(load_bytes(line, j), load_floats(x, j), a)
        b = fused(load_bytes(line, j + COUNT), load_floats(x, j + COUNT), b)
        h = j + STEP
        a = fused(load_bytes(line, h), load_floats(x, h), a)
        b = fused(load_bytes(line, h + COUNT), load_floats(x, h + COUNT), b)
    if whole < len(line):
        a = fused(load_bytes(line, whole), load_floats(x, whole), a)
        b = fused(load_bytes(line, whole + COUNT), load_floats(x, whole + COUNT), b)
    return total(a) + total(b)


@nb.njit(cache=True, nogil=True)
def _weights_alone(codes: I8, row: F32, col: F32, band: int, out: U16 | U32) -> None:
    _weights(codes, row, col, band, 0, len(codes), out)


@nb.njit(cache=True, nogil=True, parallel=True)
def _weights_shared(codes: I8, row: F32, col: F32, band: int, out: U16 | U32) -> None:
    for c in nb.prange((len(codes) + _CHUNK - 1) // _CHUNK):
        _weights(codes, row, col, band, c * _CHUNK, min((c + 1) * _CHUNK, len(codes)), out)


@nb.njit(cache=True, nogil=True)
def _weights(
    codes: I8, row: F32, col: F32, band: int, first: int, end: int, out: U16 | U32
) -> None:
    """The bits of float32, or of bfloat16: the nearest, ties to even."""
    for r in range(first, end):
        of, by, scale, to = codes[r], col[r // band], row[r], out[r]
        for j in range(0, codes.shape[1], COUNT):
            weights_along(of, by, scale, to, j)
