"""MXFP4: 4-bit floats (E2M1) in blocks of 32 with one power-of-two scale each, as gpt-oss ships its
experts.

Per experts module ``X_blocks`` U8 [E, out, in/32, 16] and ``X_scales`` U8 [E, out, in/32]; value =
FP4[nibble] * 2^(scale - 127), the low nibble is the even element (OCP Microscaling Formats 1.0).
The model's own parameter ``X`` is [E, in, out]: transposed. All values are exact in bf16, whose
exponent has the same range.
"""

import torch
from torch import Tensor

from qmoe.errors import SourceError
from qmoe.source.formats import loops
from qmoe.source.formats.virtual import Raw, Virtual

BLOCKS, SCALES = "_blocks", "_scales"
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """Values of packed blocks.

    Args:
        blocks: uint8 [..., n, 16], two values a byte.
        scales: uint8 [..., n], exponents with a bias of 127.

    Returns:
        bf16 [..., n * 32].
    """
    n = scales.shape[-1]
    out = torch.empty(*scales.shape[:-1], n * 32, dtype=torch.bfloat16)
    loops.nibble_blocks(
        blocks.reshape(-1, n * 16).numpy(),
        FP4.numpy(),
        scales.reshape(-1, n).view(torch.float8_e8m0fnu).float().numpy(),
        out.view(-1, n * 32).view(torch.uint16).numpy(),
    )
    return out


class Mxfp4(Virtual):
    """A stack of expert matrices [E, in, out]."""

    def __init__(self, blocks: str, scales: str) -> None:
        self.parts = (blocks, scales)

    def shape(self, raw: Raw) -> tuple[int, ...]:
        b, s = (raw.shape(p) for p in self.parts)
        if (
            len(b) != 4
            or b[3] != 16
            or s != b[:3]
            or any(raw.dtype(p) != torch.uint8 for p in self.parts)
        ):
            raise SourceError(
                f"MXFP4 tensors {self.parts[0]!r} {list(b)} and {self.parts[1]!r} {list(s)} do "
                "not fit: expected bytes [E, out, n, 16] and [E, out, n]"
            )
        return b[0], b[2] * 32, b[1]

    def rows(self, raw: Raw, start: int, stop: int) -> Tensor:
        out = torch.empty(stop - start, *self.shape(raw)[1:], dtype=torch.bfloat16)
        for e in range(start, stop):  # one expert at a time bounds the unpacked copy
            out[e - start] = dequantize(*(raw.read(p, e) for p in self.parts)).T
        return out


def recognise(raw: Raw) -> tuple[dict[str, Virtual], set[str]]:
    """Dense names with their virtual tensors, and the names to hide.

    Raises:
        SourceError: blocks without scales or scales without blocks.
    """
    names = set(raw.names())
    dense: dict[str, Virtual] = {}
    for name in sorted(names):
        if name.endswith(BLOCKS):
            stem = name.removesuffix(BLOCKS)
            if stem + SCALES not in names:
                raise SourceError(
                    f"MXFP4 tensor {name!r} has no {stem + SCALES!r} beside it; the checkpoint is "
                    "incomplete"
                )
            dense[stem] = Mxfp4(name, stem + SCALES)
        elif name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS not in names:
            raise SourceError(
                f"MXFP4 scales {name!r} have no blocks beside them; the checkpoint is incomplete"
            )
    return dense, {p for v in dense.values() for p in v.parts}
