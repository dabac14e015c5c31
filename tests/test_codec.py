"""Encode -> decode, exactly: compiled decoders against the codes that went in and against the
plain-Python definition."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from qmoe.codec import decode_codes, decode_dense, encode_group, matvec, parse_matrix, parse_tables
from qmoe.codec.decoder.matrix import PADDING_WORDS
from qmoe.codec.decoder.reference import decode as decode_reference
from qmoe.types import QuantizedMatrix


def random_matrix(rows, cols, seed=0, step=2.6, spread=0.5, negative=False, clip=127):
    """Laplace weights with log-normal row and column energies, rounded to a uniform step."""
    rng = np.random.default_rng(seed)
    r, c = np.exp(rng.normal(0, spread, rows)), np.exp(rng.normal(0, spread, cols))
    weights = rng.laplace(0, 1, (rows, cols)) * r[:, None] * c
    codes = np.clip(np.rint(weights / step), -clip - 1, clip).astype(np.int8)
    index = [(np.rint(np.log2(v) * 16) * 4).astype(np.int16) for v in (r, c)]
    other = torch.from_numpy(rng.integers(-300, -100, rows).astype(np.int16)) if negative else None
    return QuantizedMatrix(torch.from_numpy(codes), *(torch.from_numpy(i) for i in index), other)


def plain(codes):
    """A matrix with unit scales."""
    codes = torch.as_tensor(codes, dtype=torch.int8)
    return QuantizedMatrix(codes, *(torch.zeros(n, dtype=torch.int16) for n in codes.shape))


def assert_same(a, b):
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.row_scale, b.row_scale)
    assert torch.equal(a.col_scale, b.col_scale)
    assert (a.row_scale_neg is None) == (b.row_scale_neg is None)
    if a.row_scale_neg is not None:
        assert torch.equal(a.row_scale_neg, b.row_scale_neg)


def check(matrices, reference=True, limit=None):
    """Round trip through every decoder; returns the tables."""
    group = encode_group(matrices, limit=limit)
    tables = parse_tables(group.tables)
    generator = torch.Generator().manual_seed(1)
    for matrix, blob in zip(matrices, group.matrices, strict=True):
        layout = parse_matrix(tables, blob)
        assert_same(decode_codes(tables, layout), matrix)
        assert torch.equal(decode_dense(tables, layout), matrix.dequantize())
        if reference:
            assert_same(decode_reference(group.tables, blob), matrix)
        for n in (0, 1, 3):
            x = torch.randn(n, matrix.codes.shape[1], generator=generator)
            y, exact = matvec(tables, layout, x), x.double() @ matrix.dequantize().double().T
            assert y.shape == exact.shape
            assert (y - exact).norm() <= 1e-5 * exact.norm()
    return tables


@pytest.mark.parametrize("cols", [1, 2, 15, 16, 17, 255, 767, 768, 1023, 1024, 1025, 4097])
@pytest.mark.parametrize("rows", [1, 2, 15, 17])
def test_ragged_shapes(rows, cols):
    check([random_matrix(rows, cols, seed=cols)], reference=rows < 3)


@pytest.mark.parametrize("rows", [63, 64, 65, 255, 1025, 4097])
def test_many_rows(rows):
    check([random_matrix(rows, 17, seed=rows)])


def test_group_shares_tables_between_unlike_matrices():
    dense = random_matrix(40, 300, seed=1, step=0.1, negative=True)
    sparse = random_matrix(40, 300, seed=2, step=9)
    empty = plain(torch.zeros(40, 300))
    check([dense, sparse, empty, sparse])


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (70, 2048)])
def test_zero_matrix(shape):
    check([plain(torch.zeros(shape))])


@pytest.mark.parametrize("value", [1, -1, 2, 31, -32, 127, -128])
@pytest.mark.parametrize("limit", [None, 8, 10, 12])
def test_one_weight_and_constant_matrices(value, limit):
    single = torch.zeros(5, 40)
    single[2, 39] = value
    last = torch.zeros(5, 40)
    last[:, -1] = value
    check([plain(single), plain(last), plain(torch.full((5, 40), value))], limit=limit)


def test_one_heavy_column():
    codes = random_matrix(50, 700, step=12, seed=3).codes
    codes[:, 333] = torch.arange(-25, 25) * 5
    check([plain(codes)])


def test_wide_alphabet_uses_every_value():
    rng = np.random.default_rng(0)
    codes = rng.integers(-128, 128, (33, 259)).astype(np.int8)
    tables = check([plain(codes)])
    assert tables.limit > 8


@pytest.mark.parametrize("step", [0.02, 0.1, 0.3, 1.0, 2.0, 4.0, 8.0])
@pytest.mark.parametrize("limit", [8, 9, 10, 11, 12])
def test_rates_and_code_limits(step, limit):
    check([random_matrix(30, 500, seed=7, step=step)], limit=limit, reference=False)


def test_all_kinds_of_tables_occur():
    matrices = [random_matrix(96, 1500, seed=s, step=4.0, spread=1.2) for s in range(3)]
    tables = check(matrices, reference=False)
    runs = {run for run, _ in tables.kinds}
    assert {1, 62} <= runs
    assert len(runs) >= 6
    assert tables.escapes > 0


def test_rounding_to_other_types():
    matrix = random_matrix(20, 30)
    group = encode_group([matrix])
    tables = parse_tables(group.tables)
    layout = parse_matrix(tables, group.matrices[0])
    expected = matrix.dequantize().bfloat16()
    assert torch.equal(decode_dense(tables, layout, torch.bfloat16), expected)


def test_layout_is_what_a_kernel_expects():
    matrix = random_matrix(20, 2500, seed=4, step=3)
    matrix.codes[:, 100:200] = 0
    group = encode_group([matrix])
    layout = parse_matrix(parse_tables(group.tables), group.matrices[0])
    coded = int((matrix.codes != 0).any(0).sum())
    assert layout.pieces == 3
    assert layout.span == -(-coded // 3) + 1
    assert layout.slots.shape == layout.slot_class.shape == (3, layout.span + 1)
    assert (layout.slots[:, [0, -1]] == 2500).all()
    assert (
        sorted(layout.col_order.tolist()) == (matrix.codes != 0).any(0).nonzero().flatten().tolist()
    )
    assert layout.stream_start.shape == (61,)
    assert (layout.stream_start.diff() > 0).all()
    assert 32 * (layout.words.numel() - PADDING_WORDS) - layout.stream_start[-1] < 32


def test_same_input_same_bytes():
    matrices = [random_matrix(40, 100, seed=s) for s in range(2)]
    a, b = encode_group(matrices), encode_group(matrices)
    assert torch.equal(a.tables, b.tables)
    assert all(torch.equal(x, y) for x, y in zip(a.matrices, b.matrices, strict=True))


def test_threads_change_nothing():
    matrix = random_matrix(1025, 1100, step=3)
    group = encode_group([matrix])
    tables = parse_tables(group.tables)
    layout = parse_matrix(tables, group.matrices[0])
    x = torch.randn(1, 1100, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            with ThreadPoolExecutor(3) as pool:  # callers have threads of their own
                calls = [pool.submit(decode_dense, tables, layout) for _ in range(4)]
                calls += [pool.submit(matvec, tables, layout, x) for _ in range(4)]
                results.append([c.result() for c in calls])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], matrix.dequantize())
    for result in results:
        assert all(torch.equal(r, results[0][0]) for r in result[:4])
        assert all(torch.equal(r, results[0][4]) for r in result[4:])


def test_refused():
    with pytest.raises(ValueError, match="at least one"):
        encode_group([])
    with pytest.raises(ValueError, match="one shape"):
        encode_group([plain(torch.zeros(2, 3)), plain(torch.zeros(3, 2))])
    for shape in ((0, 4), (4, 0), (1, 65536)):
        with pytest.raises(ValueError, match="cannot encode"):
            encode_group([plain(torch.zeros(shape))])
    bad = plain(torch.zeros(2, 3))
    bad.col_scale[1] = 2048
    with pytest.raises(ValueError, match="scale indices 0 to 2048"):
        encode_group([bad])
    group = encode_group([random_matrix(4, 5)])
    tables = parse_tables(group.tables)
    layout = parse_matrix(tables, group.matrices[0])
    for x in (torch.zeros(1, 4), torch.zeros(5), torch.zeros(1, 5, dtype=torch.float64)):
        with pytest.raises(ValueError, match="float32"):
            matvec(tables, layout, x)
