"""AWQ's 4-bit integers in the layout "gemm" (AutoAWQ).

``X.qweight`` int32 [C, R / 8], ``X.qzeros`` int32 [groups, R / 8], ``X.scales`` [groups, R]; eight
outputs lie in a word, in the order 0 2 4 6 1 3 5 7 from the lowest bits up; W[r, c] = (q - zero) *
scale.
"""

import torch
from torch import Tensor

from qmoe.errors import SourceError
from qmoe.source.formats.int4 import complete, unpack
from qmoe.source.formats.virtual import Raw, Virtual

BITS, PER_WORD = 4, 8
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where output j of a word lies among its eight nibbles


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, group: int) -> Tensor:
    """An AWQ matrix.

    Args:
        qweight: int32 [cols, rows / 8].
        qzeros: int32 [groups, rows / 8].
        scales: float [groups, rows].
        group: columns of a group.

    Returns:
        bf16 [rows, cols], computed in float32, where the product is exact.
    """
    q, zeros = (unpack(w, BITS).unflatten(-1, (-1, PER_WORD)) for w in (qweight, qzeros))
    q, zeros = (w[..., list(PLACES)].flatten(-2) for w in (q, zeros))
    centred = q.unflatten(0, (-1, group)) - zeros[:, None]
    dense: Tensor = (centred.float() * scales.float()[:, None]).flatten(0, 1).T
    return dense.to(torch.bfloat16).contiguous()


class Awq(Virtual):
    """An AWQ matrix [R, C] = [out, in]. Rows lie across all words, so any selection reads the whole
    matrix.
    """

    def __init__(self, stem: str, group: int) -> None:
        self.parts = tuple(f"{stem}.{p}" for p in ("qweight", "qzeros", "scales"))
        self.group = group

    def shape(self, raw: Raw) -> tuple[int, ...]:
        words, zeros, scales = (raw.shape(p) for p in self.parts)
        fine = len(words) == 2 and all(raw.dtype(p) == torch.int32 for p in self.parts[:2])
        cols, rows = (words[0], words[1] * PER_WORD) if fine else (0, 0)
        per = self._group(cols)
        groups = cols // per if per else 0
        fine = fine and bool(per) and cols % per == 0 and zeros == (groups, words[1])
        if not fine or scales != (groups, rows):
            shapes = ", ".join(f"{p!r} {list(raw.shape(p))}" for p in self.parts)
            raise SourceError(
                f"AWQ tensors {shapes} do not fit each other at 4 bits and group size {self.group}"
            )
        return rows, cols

    def _group(self, cols: int) -> int:
        return cols if self.group < 0 else self.group

    def rows(self, raw: Raw, start: int, stop: int) -> Tensor:
        per = self._group(self.shape(raw)[1])
        words, zeros, scales = (raw.read(p) for p in self.parts)
        return dequantize(words, zeros, scales, per)[start:stop].contiguous()


def recognise(raw: Raw, group: int) -> tuple[dict[str, Virtual], set[str]]:
    """Dense names ``X.weight`` of AWQ matrices, and the names to hide.

    Raises:
        SourceError: a companion is missing.
    """
    names = set(raw.names())
    dense: dict[str, Virtual] = {}
    for name in sorted(n for n in names if n.endswith(".qweight")):
        tensor = Awq(name.removesuffix(".qweight"), group)
        complete(tensor, names)
        dense[name.removesuffix("qweight") + "weight"] = tensor
    return dense, {p for v in dense.values() for p in v.parts}
