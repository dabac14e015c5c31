"""Encoders of low-precision source formats, written from the formats' descriptions and not from our
decoders. Each has a plain decoder beside it, or returns the dense values with what it stored.

tests/tiny.py takes this module by path, since tests are no package.
"""

import torch
from torch import Tensor


def fp8_grid(scale: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    return torch.tensor(
        [
            [float(scale[i // block[0], j // block[1]]) for j in range(shape[1])]
            for i in range(shape[0])
        ]
    )


def fp8_encode(w: Tensor, block: tuple[int, int], powers: bool = False) -> tuple[Tensor, Tensor]:
    """float8 weights and float32 scales per block, the last blocks cropped; `powers` of two only,
    as ue8m0 has them.
    """
    (rows, cols), (bm, bn) = w.shape, block
    scale = torch.empty(-(-rows // bm), -(-cols // bn))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            top = w[i * bm : (i + 1) * bm, j * bn : (j + 1) * bn].float().abs().max() / 448
            top = top.clamp(min=1e-12)
            scale[i, j] = torch.exp2(torch.ceil(torch.log2(top))) if powers else top
    return (w.float() / fp8_grid(scale, w.shape, block)).to(torch.float8_e4m3fn), scale


def fp8_decode(q: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    return (q.float() * fp8_grid(scale, q.shape, block)).bfloat16()


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def mxfp4_encode(w: Tensor) -> tuple[Tensor, Tensor]:
    """[..., n, k] -> bytes [..., n, k / 32, 16] and exponents [..., n, k / 32]."""
    b = w.float().unflatten(-1, (-1, 32))
    e = torch.floor(torch.log2(b.abs().amax(-1).clamp(min=2.0**-120))) - 2
    q = ((b / torch.exp2(e)[..., None])[..., None] - FP4).abs().argmin(-1).to(torch.uint8)
    return q[..., 0::2] + 16 * q[..., 1::2], (e + 127).to(torch.uint8)


def mxfp4_decode(blocks: Tensor, scales: Tensor) -> Tensor:
    v = torch.stack([FP4[(blocks % 16).long()], FP4[(blocks // 16).long()]], -1).flatten(-2)
    return (v * torch.exp2(scales.float() - 127)[..., None]).flatten(-2).bfloat16()


def pack_words(q: Tensor, bits: int) -> Tensor:
    """Unsigned integers [rows, cols] -> int32 [rows, ceil(cols * bits / 32)], lowest bits first."""
    n = 32 // bits
    padded = torch.nn.functional.pad(q.long(), (0, -q.shape[1] % n)).unflatten(1, (-1, n))
    word = sum(padded[..., i] << (bits * i) for i in range(n))
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def int4_encode(w: Tensor, group: int, bits: int = 4) -> tuple[dict[str, Tensor], Tensor]:
    """compressed-tensors' pack-quantized tensors by suffix, and the dense values."""
    g = w.float().unflatten(1, (-1, group))
    half = 2 ** (bits - 1)
    scale = (g.abs().amax(-1) / (half - 1)).bfloat16()
    q = (g / scale.float()[..., None]).round().clamp(-half, half - 1)
    dense = (q * scale.float()[..., None]).flatten(1).bfloat16()
    packed = pack_words((q + half).flatten(1), bits)
    shape = torch.tensor(w.shape)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": shape}, dense


def gptq_encode(
    w: Tensor, group: int, bits: int = 4, version: int = 1, order: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """GPTQ tensors by suffix, and the dense values; `order` [cols] gives every column's group."""
    rows, cols = w.shape
    order = torch.arange(cols) // group if order is None else order
    count, top = int(order.max()) + 1, 2**bits - 1
    scales, zeros = torch.empty(count, rows), torch.empty(count, rows)
    q = torch.empty(rows, cols)
    for k in range(count):
        part = w[:, order == k].float()
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scales[k] = ((high - low) / top).half().float()
        zeros[k] = (-low / scales[k]).round().clamp(1, top)
        q[:, order == k] = (part / scales[k][:, None] + zeros[k][:, None]).round().clamp(0, top)
    dense = (q - zeros[order].T) * scales[order].T
    tensors = {
        "qweight": pack_words(q, bits).T,
        "qzeros": pack_words(zeros - (1 if version == 1 else 0), bits),
        "scales": scales.half(),
        "g_idx": order.to(torch.int32),
    }
    return tensors, dense.bfloat16()


def nvfp4_encode(w: Tensor, divide: bool) -> tuple[dict[str, Tensor], Tensor]:
    """NVFP4 of a matrix [rows, cols]: {"packed", "scale", "whole"} and the dense values; `divide`
    says whether the number of the whole matrix divides the scales (compressed-tensors) or
    multiplies them (ModelOpt).
    """
    b = w.float().unflatten(1, (-1, 16))
    top = b.abs().amax()
    whole = 448 * 6 / top if divide else top / (448 * 6)
    share = (b.abs().amax(-1) / 6) * whole if divide else (b.abs().amax(-1) / 6) / whole
    scale = share.clamp(min=2**-6).to(torch.float8_e4m3fn)
    factor = scale.float() / whole if divide else scale.float() * whole
    q = ((b / factor[..., None])[..., None] - FP4).abs().argmin(-1).to(torch.uint8).flatten(1)
    dense = (FP4[q.long()].unflatten(1, (-1, 16)) * factor[..., None]).flatten(1).bfloat16()
    return {"packed": q[:, 0::2] + 16 * q[:, 1::2], "scale": scale, "whole": whole}, dense


def awq_encode(w: Tensor, group: int) -> tuple[dict[str, Tensor], Tensor]:
    """AutoAWQ's tensors by suffix (version gemm), and the dense values."""
    b = w.float().unflatten(1, (-1, group))
    low, high = b.amin(-1).clamp(max=0), b.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round()
    q = ((b / scale[..., None]).round() + zero[..., None]).clamp(0, 15)
    dense = ((q - zero[..., None]) * scale[..., None]).flatten(1).bfloat16()

    def pack(t: Tensor) -> Tensor:  # [n, rows]: eight rows a word, not in their order
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
        return pack_words(t.unflatten(1, (-1, 8))[..., order].flatten(1), 4)

    tensors = {"qweight": pack(q.flatten(1).T), "qzeros": pack(zero.T), "scales": scale.T.half()}
    return tensors, dense
