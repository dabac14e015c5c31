"""8-bit floating point weights with scales per block, row, or tensor.

DeepSeek-V3's layout: ``X.weight`` F8_E4M3 [R, C] and ``X.weight_scale_inv`` [ceil(R/bm),
ceil(C/bn)]; W = weight * scale, every scale valid for its block of bm x bn, blocks at the right and
bottom edge cropped. The grid is laid out from the block size and not from R // scale_rows, which
differ when R is no multiple of bm (DeepSeek-V3's 576 rows have 5 scales of 128, not of 115). Scales
are float32 or bf16, or powers of two alone (ue8m0: byte b means 2^(b - 127)), as F8_E8M0 or as
plain bytes. Signed 8-bit integers with scales per row or tensor are read by the same code.
"""

import torch
from torch import Tensor

from qmoe.errors import SourceError
from qmoe.source.formats import loops
from qmoe.source.formats.virtual import Raw, Virtual

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
DEFAULT_BLOCK = (128, 128)  # transformers' own, where the settings name none
SUFFIXES = ("_scale_inv", "_scale", "_weight_scale")  # appended to the weight's name
SIBLINGS = ("scale", "qscale_weight")  # beside "X.weight" as "X.scale"


def scale_values(scale: Tensor) -> Tensor:
    """Scales as float32; bytes and F8_E8M0 are exponents with a bias of 127."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.float()


def dequantize(
    weight: Tensor, scale: Tensor, block: tuple[int, int] | None, first_row: int = 0
) -> Tensor:
    """Dense values of an fp8 matrix.

    Args:
        weight: float8 [rows, cols], a range of rows of the whole matrix.
        scale: with `block`, [n, ceil(cols / block[1])] beginning at the block that holds
            `first_row`; without, anything that broadcasts to [rows, cols].
        block: rows and columns of a block.
        first_row: index of ``weight[0]`` in the whole matrix.

    Returns:
        bf16 [rows, cols], computed in float32.
    """
    grid = scale_values(scale)
    if block is None:
        return (weight.float() * grid).to(torch.bfloat16)
    table = torch.arange(256, dtype=torch.uint8).view(weight.dtype).float()
    out = torch.empty(weight.shape, dtype=torch.bfloat16)
    loops.scaled_bytes(
        weight.contiguous().view(torch.uint8).numpy(),
        table.numpy(),
        grid.contiguous().numpy(),
        *block,
        first_row,
        out.view(torch.uint16).numpy(),
    )
    return out


class Fp8(Virtual):
    """``weight * scale`` of a 2-D matrix, or of a 3-D stack of matrices [E, R, C] with a stack of
    scales.
    """

    def __init__(
        self,
        weight: str,
        scale: str,
        block: tuple[int, int] | None,
        stated: bool = True,
        kinds: tuple[torch.dtype, ...] = FP8,
    ) -> None:
        self.parts = (weight, scale)
        self.block = block
        self.stated = stated
        self.kinds = kinds

    def shape(self, raw: Raw) -> tuple[int, ...]:
        weight, scale = self.parts
        shape, grid = raw.shape(weight), raw.shape(scale)
        if raw.dtype(weight) not in self.kinds:
            raise SourceError(
                f"{weight!r} has a scale {scale!r} but is {raw.dtype(weight)}, expected "
                f"{' or '.join(map(str, self.kinds))}"
            )
        if len(shape) not in (2, 3):
            raise SourceError(
                f"fp8 tensor {weight!r} has shape {list(shape)}; only matrices and stacks of "
                "matrices are supported"
            )
        if not self.stated and grid in ((), (1,), shape[:-1], (*shape[:-1], 1)):
            self.block = None
        if self.block is not None:
            fine = grid == (
                *shape[:-2],
                -(-shape[-2] // self.block[0]),
                -(-shape[-1] // self.block[1]),
            )
        else:
            full = self._full(grid, shape)
            fine = len(full) == len(shape) and all(
                g in (1, n) for g, n in zip(full, shape, strict=True)
            )
        if not fine:
            blocks = (
                f"blocks of {self.block[0]} x {self.block[1]}"
                if self.block
                else "scales per row or tensor"
            )
            raise SourceError(
                f"scale {scale!r} {list(grid)} does not fit {weight!r} {list(shape)} with {blocks}"
            )
        return shape

    @staticmethod
    def _full(grid: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
        """A scale's shape with as many dimensions as the weight: one number, one per row, or one
        per matrix of a stack.
        """
        if len(grid) == len(shape):
            return grid
        if grid in ((), (1,)):
            return (1,) * len(shape)
        return (*grid, *(1,) * (len(shape) - len(grid)))

    def rows(self, raw: Raw, start: int, stop: int) -> Tensor:
        weight, scale = self.parts
        shape = raw.shape(weight)
        if len(shape) == 3:
            out = torch.empty(stop - start, *shape[1:], dtype=torch.bfloat16)
            for i in range(start, stop):  # one matrix at a time: the float32 copy stays small
                out[i - start] = dequantize(
                    raw.read(weight, i), self._scale(raw, i, i + 1)[0], self.block
                )
            return out
        if self.block is None:
            return dequantize(
                raw.read(weight, slice(start, stop)), self._scale(raw, start, stop), None
            )
        blocks = slice(start // self.block[0], -(-stop // self.block[0]))
        return dequantize(
            raw.read(weight, slice(start, stop)), raw.read(scale, blocks), self.block, start
        )

    def _scale(self, raw: Raw, start: int, stop: int) -> Tensor:
        """Scales of ``weight[start:stop]`` for stacks, or for matrices without blocks."""
        weight, scale = self.parts
        grid = self._full(raw.shape(scale), raw.shape(weight))
        if grid[0] == 1:
            return raw.read(scale).reshape(grid)
        return raw.read(scale, slice(start, stop)).reshape(stop - start, *grid[1:])


def recognise(
    raw: Raw,
    block: tuple[int, int] | None,
    stated: bool = True,
    kinds: tuple[torch.dtype, ...] = FP8,
) -> tuple[dict[str, Virtual], set[str]]:
    """Dense names with their virtual tensors, and the names to hide: every weight that has a scale
    beside it.

    Args:
        raw: stored tensors.
        block: rows and columns of a block, or None for scales per row or tensor.
        stated: whether the settings say so; if not, a scale of one number or of one per row is
            taken as that. (No grid of blocks has such a shape and another meaning.)
        kinds: dtypes of weights.
    """
    names = set(raw.names())
    dense: dict[str, Virtual] = {}
    hidden: set[str] = set()
    for name in sorted(names):
        stem, _, last = name.rpartition(".")
        candidates = [name + s for s in SUFFIXES]
        if last == "weight":
            candidates += [f"{stem}.{s}" for s in SIBLINGS]
        scale = next((c for c in candidates if c in names), None)
        if scale is not None:
            dense[name] = Fp8(name, scale, block, stated, kinds)
            hidden.add(scale)
    return dense, hidden
