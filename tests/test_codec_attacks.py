"""Hostile bytes: whatever a blob holds, it is refused by name or decodes inside its buffers; a
checksum catches every change."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qmoe.codec import decode_codes, decode_dense, encode_group, matvec, parse_matrix, parse_tables
from qmoe.codec.decoder.matrix import PADDING_WORDS
from qmoe.errors import CorruptError
from qmoe.types import QuantizedMatrix


def group(seed, rows=24, cols=70, step=2.0, limit=None):
    """Two small matrices with all side data in use, so that random flips hit every field."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(2):
        r, c = np.exp(rng.normal(0, 0.8, rows)), np.exp(rng.normal(0, 0.8, cols))
        codes = (
            np.rint(rng.laplace(0, 1, (rows, cols)) * r[:, None] * c / step)
            .clip(-128, 127)
            .astype(np.int8)
        )
        scales = [rng.integers(-99, 99, n).astype(np.int16) for n in (rows, cols, rows)]
        out.append(QuantizedMatrix(torch.from_numpy(codes), *(torch.from_numpy(s) for s in scales)))
    return encode_group(out, limit=limit)


def corrupt(blob, rng):
    """Flips 1 to 8 bits, or overwrites, cuts or extends the blob; never returns it unchanged."""
    data = blob.numpy().copy()
    kind = rng.integers(8)
    if kind < 5:
        for bit in rng.choice(8 * data.size, rng.integers(1, 9), replace=False):
            data[bit // 8] ^= 1 << (bit % 8)
    elif kind == 5:
        at = rng.integers(data.size)
        data[at : at + rng.integers(1, 9)] ^= rng.integers(1, 256, dtype=np.uint8)
    elif kind == 6:
        data = data[: rng.integers(data.size)]
    else:
        data = np.concatenate([data, rng.integers(0, 256, 4 * rng.integers(1, 4), dtype=np.uint8)])
    return torch.from_numpy(data)


def use(tables, layout):
    """Runs every decoder; memory outside the buffers would be the sanitizer's or the allocator's to
    notice."""
    matrix = decode_codes(tables, layout)
    assert matrix.codes.shape == (layout.rows, layout.cols)
    assert decode_dense(tables, layout).shape == matrix.codes.shape
    assert matvec(tables, layout, torch.ones(1, layout.cols)).shape == (1, layout.rows)
    assert matvec(tables, layout, torch.ones(2, layout.cols)).shape == (2, layout.rows)


def attack(cases, seed):
    """Returns how many corrupted blobs were refused and how many decoded to something, without
    checksums."""
    rng = np.random.default_rng(seed)
    refused = decoded = 0
    for case in range(cases):
        if case % 100 == 0:
            rows, cols = int(rng.integers(1, 90)), int(rng.integers(1, 90))
            encoded = group(int(rng.integers(1 << 30)), rows, cols, float(rng.choice([0.05, 1, 4])))
            tables = parse_tables(encoded.tables)
        try:
            if case % 2:
                blob = corrupt(encoded.tables, rng)
                with pytest.raises(CorruptError):
                    parse_tables(blob)
                hostile = parse_tables(blob, check=False)
                if hostile.rows * hostile.cols > 1 << 22:
                    continue  # a large shape is legal in itself; the matrix is what must fill it
                use(hostile, parse_matrix(hostile, encoded.matrices[0], check=False))
            else:
                blob = corrupt(encoded.matrices[1], rng)
                with pytest.raises(CorruptError):
                    parse_matrix(tables, blob)
                use(tables, parse_matrix(tables, blob, check=False))
            decoded += 1
        except CorruptError:
            refused += 1
    return refused, decoded


def test_random_corruption():
    refused, decoded = attack(500, seed=0)
    assert refused > 350
    assert decoded > 0  # some flips only change values: that is what the checksum is for


@pytest.mark.slow
def test_random_corruption_at_length():
    refused, decoded = attack(10_000, seed=1)
    assert refused > 7_000
    assert decoded > 0


def test_every_single_flip_is_caught_by_the_checksum():
    encoded = group(5, rows=6, cols=9)
    tables = parse_tables(encoded.tables)
    for bit in range(8 * encoded.tables.numel()):
        blob = encoded.tables.clone()
        blob[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(CorruptError):
            parse_tables(blob)
    for bit in range(8 * encoded.matrices[0].numel()):
        blob = encoded.matrices[0].clone()
        blob[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(CorruptError):
            parse_matrix(tables, blob)


def test_matrix_of_another_group_is_refused():
    a, b = group(1), group(2)
    with pytest.raises(CorruptError, match="checksum"):
        parse_matrix(parse_tables(a.tables), b.matrices[0])


def test_swapped_blobs_are_refused():
    a = group(1)
    tables = parse_tables(a.tables)
    with pytest.raises(CorruptError, match="starts with"):
        parse_tables(a.matrices[0])
    with pytest.raises(CorruptError, match="starts with"):
        parse_matrix(tables, a.tables)


@pytest.mark.parametrize("size", [0, 1, 3, 4, 8, 31])
def test_short_blobs_are_refused(size):
    a = group(1)
    tables = parse_tables(a.tables)
    with pytest.raises(CorruptError, match="bytes"):
        parse_tables(a.tables[:size])
    with pytest.raises(CorruptError, match=r"bytes|checksum"):
        parse_matrix(tables, a.matrices[0][:size])


def test_not_a_blob():
    for bad in (torch.zeros(8), torch.zeros(4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            parse_tables(bad)


def test_streams_must_end_at_their_stored_length():
    encoded = group(3, rows=64, cols=60)
    tables = parse_tables(encoded.tables)
    layout = parse_matrix(tables, encoded.matrices[0])
    payload = 4 * (layout.words.numel() - PADDING_WORDS)
    for value in (0, 0xFF):
        blob = encoded.matrices[0].clone()
        blob[-4 - payload : -8] = value
        with pytest.raises(CorruptError, match="do not end at bit"):
            parse_matrix(tables, blob, check=False)


def test_a_small_blob_cannot_claim_many_rows():
    encoded = group(1)
    tables = parse_tables(encoded.tables)
    huge = dataclasses.replace(tables, rows=(1 << 24) - 1)
    with pytest.raises(CorruptError, match="streams"):
        parse_matrix(huge, encoded.matrices[0], check=False)


@pytest.mark.slow
def test_random_corruption_with_bounds_checks(tmp_path):
    """The same attack with every array access of the compiled loops checked; a miss is an
    IndexError."""
    env = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    test = f"{Path(__file__)}::test_random_corruption"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
