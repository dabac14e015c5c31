"""Golden words: the exact bytes of small groups. If one changes, the format has changed: raise the
format version."""

import hashlib

import pytest
import torch

from qmoe.codec import decode_codes, encode_group, parse_matrix, parse_tables
from qmoe.types import QuantizedMatrix


def pattern(rows, cols, scale, negative):
    """Integers from a small linear congruence: no random generator may change them."""
    state, values = 12345, []
    for _ in range(rows * cols):
        state = (1103515245 * state + 12345) % (1 << 31)
        u = (state >> 8) / (1 << 23)
        values.append(int(scale * (u * 2 - 1) ** 5))
    codes = torch.tensor(values, dtype=torch.int8).view(rows, cols)
    row = (torch.arange(rows) % 7 * 4 - 12).to(torch.int16)
    col = (torch.arange(cols) % 5 * 16).to(torch.int16)
    return QuantizedMatrix(codes, row, col, (row - 3 * (row % 3)) if negative else None)


def test_words_of_a_tiny_group():
    group = encode_group([pattern(3, 7, 3.5, negative=False)])
    assert group.tables.numpy().tobytes().hex() == TINY_TABLES
    assert group.matrices[0].numpy().tobytes().hex() == TINY_MATRIX


@pytest.mark.parametrize(
    ("rows", "cols", "scale", "negative"),
    [(70, 130, 6.0, True), (5, 2100, 2.0, False), (9, 64, 127.9, True)],
)
def test_checksums_of_larger_groups(rows, cols, scale, negative):
    matrix = pattern(rows, cols, scale, negative)
    group = encode_group([matrix, matrix])
    words = [
        hashlib.sha256(t.numpy().tobytes()).hexdigest()[:16]
        for t in (group.tables, *group.matrices)
    ]
    assert words == CHECKSUMS[rows, cols]


def test_stored_words_still_decode():
    tables = parse_tables(torch.tensor(list(bytes.fromhex(TINY_TABLES)), dtype=torch.uint8))
    layout = parse_matrix(tables, torch.tensor(list(bytes.fromhex(TINY_MATRIX)), dtype=torch.uint8))
    assert torch.equal(decode_codes(tables, layout).codes, pattern(3, 7, 3.5, negative=False).codes)


TINY_TABLES = (
    "514d54310300000700080200000000000000640400000000600482c0e4180000000040000c0104840000000040000000"
    "d0ffffff0310400840040000000040000000000000000040401040883c000000000400000000000071aa9201"
)
TINY_MATRIX = "514d4d31e0200000c37408000e0b0000a0d577bb"
CHECKSUMS = {
    (70, 130): ["3fec715b40b131ab", "0cfabb58693c922f", "0cfabb58693c922f"],
    (5, 2100): ["f9c5aad3a644ec86", "37258c8d3e21671a", "37258c8d3e21671a"],
    (9, 64): ["abadd3f88689a3f6", "da221e5e6d646880", "da221e5e6d646880"],
}
