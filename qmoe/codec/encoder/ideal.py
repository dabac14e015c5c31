"""What the integers should cost: the entropy of block classes, without any overhead of ours."""

from collections.abc import Sequence

import numba as nb
import numpy as np
import torch

from qmoe.codec.format.arrays import F64, I8, I64
from qmoe.codec.format.classes import CONTEXTS, classify, energies
from qmoe.types import QuantizedMatrix

BLOCK_ROWS, BLOCK_COLS, BLOCK_TABLES = 64, 16, 16


def ideal_bits(matrices: Sequence[QuantizedMatrix], scale_bits: float | None = None) -> float:
    """Block-class entropy of a group's codes plus its scales: the yardstick for stored bits.

    Args:
        matrices: of one group.
        scale_bits: what the scales take as stored (`EncodedGroup.scale_bits`); None: their entropy.
    """
    scales = scale_entropy_bits(matrices) if scale_bits is None else scale_bits
    return block_class_bits(matrices) + scales


def block_class_bits(matrices: Sequence[QuantizedMatrix], rounds: int = 20) -> float:
    """Entropy with rows and columns sorted by energy, one of 16 tables per 64 x 16 block (4 bits).

    The tables are shared by all matrices and free; so are the orders. Blocks are assigned to tables
    by code length, starting from equal shares of the blocks by energy, until nothing improves.

    Args:
        matrices: codes int8 [rows, cols] each; scales are not counted.
        rounds: largest number of reassignments.
    """
    histograms = np.concatenate([_block_histograms(m.codes.numpy()) for m in matrices])
    used = np.flatnonzero(histograms.sum(0))
    blocks = histograms[:, used].astype(np.float64)
    energy = blocks @ np.abs(used - 128) / blocks.sum(1)
    table = np.empty(len(blocks), np.int64)
    table[np.argsort(energy, kind="stable")] = np.arange(len(blocks)) * BLOCK_TABLES // len(blocks)
    best = np.inf
    for _ in range(rounds):
        counts = np.zeros((BLOCK_TABLES, used.size))
        np.add.at(counts, table, blocks)
        bits = sum(_entropy_bits(c) for c in counts)
        if bits > best - 0.5:
            break
        best = bits
        smoothed = counts + 0.02
        lengths = -np.log2(smoothed / smoothed.sum(1, keepdims=True))
        table = np.argmin(blocks @ lengths.T, axis=1)
    return float(best + 4 * len(blocks))


def class_entropy_bits(matrices: Sequence[QuantizedMatrix]) -> float:
    """Entropy of the codes given their contexts (row class + column class) and nothing else."""
    total = 0.0
    histogram = np.zeros((CONTEXTS, 256), np.int64)
    for m in matrices:
        codes = m.codes.numpy()
        classes = classify(*energies(codes), 12)
        for c in np.unique(classes.col):
            columns = codes[:, classes.col == c]
            for a in np.unique(classes.row):
                part = columns[classes.row == a]
                if c:
                    histogram[a + c - 1] += np.bincount(
                        part.ravel().astype(np.int64) + 128, minlength=256
                    )
    for counts in histogram:
        total += _entropy_bits(counts.astype(np.float64))
    return total


def scale_entropy_bits(matrices: Sequence[QuantizedMatrix]) -> float:
    """Entropy of a group's scale indices, one distribution per kind of scale."""
    kinds = [[m.row_scale for m in matrices], [m.col_scale for m in matrices]]
    kinds.append([m.row_scale_neg for m in matrices if m.row_scale_neg is not None])
    total = 0.0
    for scales in kinds:
        if scales:
            total += _entropy_bits(
                np.unique(torch.cat(scales).numpy(), return_counts=True)[1].astype(float)
            )
    return total


def _entropy_bits(counts: F64) -> float:
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum()) if counts.size else 0.0


@nb.njit(cache=True, nogil=True)
def _count_blocks(codes: I8, rows: I64, cols: I64, out: I64) -> None:
    across = -(-cols.size // BLOCK_COLS)
    for i in range(rows.size):
        for j in range(cols.size):
            out[i // BLOCK_ROWS * across + j // BLOCK_COLS, int(codes[rows[i], cols[j]]) + 128] += 1


def _block_histograms(codes: I8) -> I64:
    size = np.abs(codes.astype(np.int16))
    rows = np.argsort(-size.sum(1, dtype=np.int64), kind="stable")
    cols = np.argsort(-size.sum(0, dtype=np.int64), kind="stable")
    out = np.zeros((-(-rows.size // BLOCK_ROWS) * -(-cols.size // BLOCK_COLS), 256), np.int64)
    _count_blocks(codes, rows, cols, out)
    return out
