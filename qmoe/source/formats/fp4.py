"""4-bit floats (E2M1) in rows: NVFP4 as ModelOpt and compressed-tensors write it, and MXFP4 of
single matrices.

Two values lie in a byte, the even column in the low half. Every block of a row has a scale:

- NVFP4, blocks of 16, scales F8_E4M3 [R, C / 16], and one float32 number g of the whole matrix.
  ModelOpt: ``X.weight`` U8 [R, C / 2], ``X.weight_scale``, ``X.weight_scale_2`` = g, W = q *
  (scale * g). compressed-tensors (nvfp4-pack-quantized): ``X.weight_packed``, ``X.weight_scale``,
  ``X.weight_global_scale`` = g, W = q * (scale / g).
  ModelOpt's stacks of experts X [E, C / 2, R] (Llama 4, gpt-oss) have ``X_weight_scale`` [E, C /
  16, R] and ``X_weight_scale_2``: matrices are transposed, the packed dimension is the first.
- MXFP4, blocks of 32, scales U8 or F8_E8M0 that are exponents with a bias of 127, no g.
  compressed-tensors (mxfp4-pack-quantized): ``X.weight_packed``, ``X.weight_scale``; the experts of
  DeepSeek-V4: ``X.weight`` I8 [R, C / 2] and ``X.scale``.
"""

import torch
from torch import Tensor

from qmoe.errors import SourceError
from qmoe.source.formats import loops
from qmoe.source.formats.fp8 import scale_values
from qmoe.source.formats.mxfp4 import FP4
from qmoe.source.formats.virtual import Raw, Virtual

BYTES = (torch.uint8, torch.int8)
EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)


def dequantize(packed: Tensor, scale: Tensor) -> Tensor:
    """Values of packed rows.

    Args:
        packed: bytes [rows, cols / 2].
        scale: float32 [rows, blocks], the whole factor of a block.

    Returns:
        bf16 [rows, cols], computed in float32.
    """
    rows, half = packed.shape
    out = torch.empty(rows, half * 2, dtype=torch.bfloat16)
    loops.nibble_blocks(
        packed.contiguous().view(torch.uint8).numpy(),
        FP4.numpy(),
        scale.contiguous().numpy(),
        out.view(torch.uint16).numpy(),
    )
    return out


class Fp4(Virtual):
    """A matrix [R, C] of 4-bit floats; rows are read alone.

    Args:
        packed, scale: names of the bytes and of the scales of blocks.
        whole: name of the number that every scale is multiplied with, or None.
        divide: divide by that number instead.
    """

    def __init__(
        self, packed: str, scale: str, whole: str | None = None, divide: bool = False
    ) -> None:
        self.parts = (packed, scale, *([whole] if whole is not None else []))
        self.block = 16 if whole is not None else 32
        self.divide = divide

    def shape(self, raw: Raw) -> tuple[int, ...]:
        packed, scale, *whole = (raw.shape(p) for p in self.parts)
        kinds = (torch.float8_e4m3fn,) if whole else EXPONENTS
        if (
            len(packed) != 2
            or raw.dtype(self.parts[0]) not in BYTES
            or raw.dtype(self.parts[1]) not in kinds
            or scale != (packed[0], packed[1] * 2 // self.block)
            or packed[1] * 2 % self.block
            or whole not in ([], [()], [(1,)])
        ):
            stated = ", ".join(f"{p!r} {raw.dtype(p)} {list(raw.shape(p))}" for p in self.parts)
            raise SourceError(
                f"4-bit float tensors {stated} do not fit: expected bytes [rows, columns / 2], "
                f"scales ({' or '.join(map(str, kinds))}) for every {self.block} columns"
                f"{' and one number' if whole else ''}"
            )
        return packed[0], packed[1] * 2

    def rows(self, raw: Raw, start: int, stop: int) -> Tensor:
        packed, scale = (raw.read(p, slice(start, stop)) for p in self.parts[:2])
        factor = scale_values(scale)
        if len(self.parts) > 2:
            whole = raw.read(self.parts[2]).float().reshape(())
            factor = factor / whole if self.divide else factor * whole
        return dequantize(packed, factor)


class Fp4Stack(Virtual):
    """A stack of expert matrices [E, in, out] as ModelOpt writes it: NVFP4 along the inputs."""

    def __init__(self, name: str) -> None:
        self.parts = (name, f"{name}_weight_scale", f"{name}_weight_scale_2")

    def shape(self, raw: Raw) -> tuple[int, ...]:
        packed, scale, whole = (raw.shape(p) for p in self.parts)
        if (
            len(packed) != 3
            or raw.dtype(self.parts[0]) != torch.uint8
            or raw.dtype(self.parts[1]) != torch.float8_e4m3fn
            or packed[1] % 8
            or scale != (packed[0], packed[1] // 8, packed[2])
            or whole not in ((), (1,))
        ):
            stated = ", ".join(f"{p!r} {raw.dtype(p)} {list(raw.shape(p))}" for p in self.parts)
            raise SourceError(
                f"4-bit float tensors {stated} do not fit: expected bytes [experts, inputs / 2, "
                "outputs], scales [experts, inputs / 16, outputs] and one number"
            )
        return packed[0], packed[1] * 2, packed[2]

    def rows(self, raw: Raw, start: int, stop: int) -> Tensor:
        whole = raw.read(self.parts[2]).float().reshape(())
        out = torch.empty(stop - start, *self.shape(raw)[1:], dtype=torch.bfloat16)
        for e in range(start, stop):  # one expert at a time bounds the unpacked copy
            packed, scale = (raw.read(p, e) for p in self.parts[:2])
            out[e - start] = dequantize(packed.T, scale.T.float() * whole).T
        return out


def recognise_packed(raw: Raw) -> tuple[dict[str, Virtual], set[str]]:
    """Dense names ``X.weight`` of compressed-tensors' 4-bit floats, and the names to hide.

    Raises:
        SourceError: a companion is missing.
    """
    names = set(raw.names())
    dense: dict[str, Virtual] = {}
    for name in sorted(n for n in names if n.endswith(".weight_packed")):
        stem = name.removesuffix("_packed")
        if f"{stem}_shape" in names:
            continue  # integers
        whole = f"{stem}_global_scale"
        if f"{stem}_scale" not in names:
            raise SourceError(
                f"{name!r} is quantized but {f'{stem}_scale'!r} is not in the checkpoint; it is "
                "incomplete"
            )
        dense[stem] = Fp4(name, f"{stem}_scale", whole if whole in names else None, divide=True)
    return dense, {p for v in dense.values() for p in v.parts}


def recognise_modelopt(raw: Raw) -> tuple[dict[str, Virtual], set[str]]:
    """Dense names of ModelOpt's NVFP4 matrices, and the names to hide but the dense ones.

    Raises:
        SourceError: a companion is missing.
    """
    names = set(raw.names())
    dense: dict[str, Virtual] = {}
    for whole in sorted(n for n in names if n.endswith("weight_scale_2")):
        stack = not whole.endswith(".weight_scale_2")
        name = whole.removesuffix("_weight_scale_2" if stack else "_scale_2")
        scale = whole.removesuffix("_2")
        for part in (name, scale):
            if part not in names:
                raise SourceError(
                    f"{whole!r} has no {part!r} beside it; the checkpoint is incomplete"
                )
        dense[name] = Fp4Stack(name) if stack else Fp4(name, scale, whole)
    return dense, {p for v in dense.values() for p in v.parts} - set(dense)
