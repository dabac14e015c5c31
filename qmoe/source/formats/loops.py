"""Compiled loops of the low-precision decoders: one pass from packed bytes to bf16.

torch would make three or four float32 copies of every matrix; a trillion weights go through here.
bf16 is written as its upper 16 bits, rounded to nearest even, exactly as torch rounds.
"""

import numba as nb
import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint16]
Floats = NDArray[np.float32]


@nb.njit(cache=True, nogil=True)
def round_row(values: Floats, out: Words) -> None:
    """float32 [n] -> bf16 bits [n]."""
    bits = values.view(np.uint32)
    for j in range(values.shape[0]):
        b = bits[j]
        if b & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
            out[j] = np.uint16(0x7FC0)
        else:
            tie = (b >> np.uint32(16)) & np.uint32(1)
            out[j] = np.uint16((b + np.uint32(0x7FFF) + tie) >> np.uint32(16))


@nb.njit(cache=True, nogil=True)
def scaled_bytes(
    weight: Bytes,
    table: Floats,
    grid: Floats,
    block_rows: int,
    block_cols: int,
    first: int,
    out: Words,
) -> None:
    """``out[i, j] = bf16(table[weight[i, j]] * grid[block row, block column])``.

    Args:
        weight: [rows, cols].
        table: [256], the value of every byte.
        grid: scales, beginning at the block row that holds row `first`.
        block_rows, block_cols: size of a block.
        first: index of ``weight[0]`` in the whole matrix.
        out: [rows, cols].
    """
    rows, cols = weight.shape
    line = np.empty(cols, np.float32)
    base = first // block_rows
    for i in range(rows):
        r = (first + i) // block_rows - base
        for c in range(grid.shape[1]):
            s = grid[r, c]
            for j in range(c * block_cols, min((c + 1) * block_cols, cols)):
                line[j] = table[weight[i, j]] * s
        round_row(line, out[i])


@nb.njit(cache=True, nogil=True)
def nibble_blocks(blocks: Bytes, table: Floats, scale: Floats, out: Words) -> None:
    """4-bit floats: ``out[i, 2 j + h] = bf16(table[half h of blocks[i, j]] * scale[i, j // k])``;
    exact where scales are powers of two.

    Args:
        blocks: [rows, n * k] bytes, low half first.
        table: [16].
        scale: [rows, n].
        out: [rows, n * k * 2].
    """
    rows, n = scale.shape
    width = blocks.shape[1] // n
    line = np.empty(blocks.shape[1] * 2, np.float32)
    for i in range(rows):
        for k in range(n):
            s = scale[i, k]
            for j in range(k * width, (k + 1) * width):
                b = blocks[i, j]
                line[2 * j] = table[b & np.uint8(15)] * s
                line[2 * j + 1] = table[b >> np.uint8(4)] * s
        round_row(line, out[i])


@nb.njit(cache=True, nogil=True)
def packed_rows(words: NDArray[np.uint32], scale: Floats, bits: int, cols: int, out: Words) -> None:
    """pack-quantized: ``out[i, j] = bf16((q[i, j] - 2^(bits-1)) * scale[i, group of j])``.

    Args:
        words: [rows, ceil(cols * bits / 32)], lowest bits first.
        scale: [rows, groups].
        bits: 2, 4 or 8.
        cols: columns, a multiple of the groups.
        out: [rows, cols].
    """
    rows, groups = scale.shape
    width, per = cols // groups, 32 // bits
    mask, half = np.uint32((1 << bits) - 1), 1 << (bits - 1)
    line = np.empty(words.shape[1] * per, np.float32)
    for i in range(rows):
        for w in range(words.shape[1]):
            v = words[i, w]
            for k in range(per):
                line[w * per + k] = np.float32(np.int32(v & mask) - half)
                v >>= np.uint32(bits)
        for g in range(groups):
            s = scale[i, g]
            for j in range(g * width, (g + 1) * width):
                line[j] *= s
        round_row(line[:cols], out[i])
