"""Integers packed in 32-bit words: compressed-tensors' ``pack-quantized`` (as Kimi-K2 ships it) and
GPTQ.

Both put ``32 // bits`` integers in a word, the first in the lowest bits. They differ in direction
and in what zero means:

- pack-quantized: ``X.weight_packed`` int32 [R, ceil(C / n)] along a row, ``X.weight_scale`` [R, C /
  group] (or [R, 1]), ``X.weight_shape`` = (R, C); symmetric: W = (q - 2^(bits-1)) * scale.
- GPTQ: ``X.qweight`` int32 [C / n, R] along the inputs, ``X.scales`` [groups, R], ``X.qzeros``
  int32 [groups, R / n], ``X.g_idx`` int32 [C], the group of each input; W[r, c] = (q - zero) *
  scale. The first format version ("gptq") stores zero - 1, the second ("gptq_v2") zero itself.
"""

import torch
from torch import Tensor

from qmoe.errors import SourceError
from qmoe.source.formats import loops
from qmoe.source.formats.virtual import Raw, Virtual

WIDTHS = (2, 4, 8)  # divisors of 32: no integer straddles two words


def unpack(words: Tensor, bits: int) -> Tensor:
    """Unsigned integers of words, lowest bits first: int32 [..., n * 32 // bits] of [..., n]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def dequantize_packed(words: Tensor, scale: Tensor, cols: int, bits: int) -> Tensor:
    """Rows of a pack-quantized matrix.

    Args:
        words: int32 [rows, ceil(cols * bits / 32)].
        scale: float [rows, groups], groups of ``cols / groups`` columns.

    Returns:
        bf16 [rows, cols], computed in float32.
    """
    out = torch.empty(len(words), cols, dtype=torch.bfloat16)
    loops.packed_rows(
        words.contiguous().view(torch.uint32).numpy(),
        scale.float().contiguous().numpy(),
        bits,
        cols,
        out.view(torch.uint16).numpy(),
    )
    return out


def dequantize_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int, zero_offset: int
) -> Tensor:
    """A GPTQ matrix.

    Args:
        qweight: int32 [cols * bits / 32, rows].
        qzeros: int32 [groups, rows * bits / 32].
        scales: float [groups, rows].
        g_idx: integer [cols], group of every column.
        zero_offset: 1 where the file stores zero - 1, else 0.

    Returns:
        bf16 [rows, cols], computed in float32.
    """
    rows = scales.shape[1]
    q = unpack(qweight.T.contiguous(), bits)
    zeros = (unpack(qzeros, bits)[:, :rows] + zero_offset).T
    group = g_idx.long()
    return ((q - zeros[:, group]).float() * scales.T.float()[:, group]).to(torch.bfloat16)


class Packed(Virtual):
    """A pack-quantized matrix [R, C]; rows are read alone."""

    def __init__(self, stem: str, bits: int) -> None:
        self.parts = tuple(f"{stem}.weight_{p}" for p in ("packed", "scale", "shape"))
        self.bits = bits
        self._shape: tuple[int, int] | None = None

    def shape(self, raw: Raw) -> tuple[int, ...]:
        if self._shape is not None:
            return self._shape
        words, scale, size = (raw.shape(p) for p in self.parts)
        if (
            raw.dtype(self.parts[0]) != torch.int32
            or len(words) != 2
            or len(scale) != 2
            or size != (2,)
        ):
            raise SourceError(
                f"packed tensors {self.parts[0]!r} {list(words)}, {self.parts[1]!r} {list(scale)} "
                f"and {self.parts[2]!r} {list(size)} do not fit"
            )
        rows, cols = (int(n) for n in raw.read(self.parts[2]))
        n = 32 // self.bits
        if words != (rows, -(-cols // n)) or scale[0] != rows or scale[1] < 1 or cols % scale[1]:
            raise SourceError(
                f"{self.parts[2]!r} says [{rows}, {cols}], but the words are {list(words)} and "
                f"the scales {list(scale)}; the checkpoint is inconsistent"
            )
        self._shape = rows, cols
        return self._shape

    def rows(self, raw: Raw, start: int, stop: int) -> Tensor:
        words, scale = (raw.read(p, slice(start, stop)) for p in self.parts[:2])
        return dequantize_packed(words, scale, self.shape(raw)[1], self.bits)


class Gptq(Virtual):
    """A GPTQ matrix [R, C] = [out, in]. Rows lie across all words, so any selection reads the whole
    matrix.
    """

    def __init__(self, stem: str, bits: int, group: int, zero_offset: int, has_order: bool) -> None:
        names = ("qweight", "qzeros", "scales", *(("g_idx",) if has_order else ()))
        self.parts = tuple(f"{stem}.{p}" for p in names)
        self.bits, self.group, self.zero_offset = bits, group, zero_offset

    def shape(self, raw: Raw) -> tuple[int, ...]:
        words, zeros, scales, *order = (raw.shape(p) for p in self.parts)
        n = 32 // self.bits
        fine = len(words) == len(zeros) == len(scales) == 2 and all(
            raw.dtype(p) == torch.int32 for p in self.parts[:2]
        )
        cols, rows = (words[0] * n, words[1]) if fine else (0, 0)
        groups = 1 if self.group < 0 else -(-cols // self.group)
        if (
            not fine
            or scales != (groups, rows)
            or zeros != (groups, -(-rows // n))
            or order not in ([], [(cols,)])
        ):
            shapes = ", ".join(f"{p!r} {list(raw.shape(p))}" for p in self.parts)
            raise SourceError(
                f"GPTQ tensors {shapes} do not fit each other at {self.bits} bits and group size "
                f"{self.group}"
            )
        return rows, cols

    def rows(self, raw: Raw, start: int, stop: int) -> Tensor:
        _, cols = self.shape(raw)
        words, zeros, scales = (raw.read(p) for p in self.parts[:3])
        per = cols if self.group < 0 else self.group
        order = raw.read(self.parts[3]) if len(self.parts) > 3 else torch.arange(cols) // per
        if int(order.min()) < 0 or int(order.max()) >= scales.shape[0]:
            raise SourceError(
                f"{self.parts[-1]!r} names groups {int(order.min())}..{int(order.max())}, but "
                f"there are {scales.shape[0]}"
            )
        return dequantize_gptq(words, zeros, scales, order, self.bits, self.zero_offset)[
            start:stop
        ].contiguous()


def recognise_packed(raw: Raw, bits: int) -> tuple[dict[str, Virtual], set[str]]:
    """Dense names ``X.weight`` of pack-quantized matrices, and the names to hide.

    Raises:
        SourceError: a companion is missing, or a zero point or an activation order is present
            (asymmetric quantization).
    """
    names = set(raw.names())
    dense: dict[str, Virtual] = {}
    for name in sorted(names):
        if name.endswith(".weight_packed"):
            if f"{name.removesuffix('_packed')}_global_scale" in names:
                continue  # 4-bit floats
            stem = name.removesuffix(".weight_packed")
            for odd in ("weight_zero_point", "weight_g_idx"):
                if f"{stem}.{odd}" in names:
                    raise SourceError(
                        f"{f'{stem}.{odd}'!r}: asymmetric or reordered packed weights are not "
                        "supported; use the bf16 checkpoint"
                    )
            tensor = Packed(stem, bits)
            complete(tensor, names)
            dense[f"{stem}.weight"] = tensor
    return dense, {p for v in dense.values() for p in v.parts}


def recognise_gptq(
    raw: Raw, bits: int, group: int, zero_offset: int
) -> tuple[dict[str, Virtual], set[str]]:
    """Dense names ``X.weight`` of GPTQ matrices, and the names to hide.

    Raises:
        SourceError: a companion is missing.
    """
    names = set(raw.names())
    dense: dict[str, Virtual] = {}
    for name in sorted(names):
        if name.endswith(".qweight"):
            stem = name.removesuffix(".qweight")
            tensor = Gptq(stem, bits, group, zero_offset, f"{stem}.g_idx" in names)
            complete(tensor, names)
            dense[f"{stem}.weight"] = tensor
    return dense, {p for v in dense.values() for p in v.parts}


def complete(tensor: Virtual, names: set[str]) -> None:
    """Refuses a quantized tensor of which a part is missing."""
    missing = [p for p in tensor.parts if p not in names]
    if missing:
        raise SourceError(
            f"{tensor.parts[0]!r} is quantized but {missing[0]!r} is not in the checkpoint; it is "
            "incomplete"
        )
