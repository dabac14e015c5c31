"""Products of several encoded matrices in one call are those of one matrix on one thread, bit for
bit."""

import copy
import os
import pickle
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_codec import plain, random_matrix

from qmoe.codec import (
    decode_dense,
    encode_group,
    matvec,
    matvec_pairs,
    parse_matrix,
    parse_tables,
)
from qmoe.codec.decoder import matvec as pairs
from qmoe.codec.decoder import registers
from qmoe.codec.decoder import threads as decoder_threads
from qmoe.codec.decoder.matmul import matmul_few
from qmoe.codec.decoder.tiles import dense_vectors, matmul_dense


def parsed(matrices, limit=None):
    group = encode_group(matrices, limit=limit)
    tables = parse_tables(group.tables)
    return [(tables, parse_matrix(tables, blob)) for blob in group.matrices]


def inputs(matrices):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(len(matrices), matrices[0][1].cols, generator=generator)


def one_by_one(matrices, x):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return torch.cat([matvec(*m, x[i : i + 1]) for i, m in enumerate(matrices)])
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def threads(monkeypatch):
    """Work for every number of threads, however small it is."""
    monkeypatch.setattr(decoder_threads, "_SMALL", 0)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("rows", [1, 4, 33, 130])
@pytest.mark.parametrize("cols", [1, 17, 1024, 1025, 2500])
def test_equal_to_single_products(threads, rows, cols, count):
    threads(count)
    matrices = parsed([random_matrix(rows, cols, seed=s, step=0.3 + s) for s in range(3)])
    x = inputs(matrices)
    y = matvec_pairs(matrices, x)
    assert y.shape == (3, rows)
    assert torch.equal(y, one_by_one(matrices, x))
    for i, m in enumerate(matrices):
        exact = decode_dense(*m).double() @ x[i].double()
        assert (y[i] - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("limit", [8, 9, 12])
@pytest.mark.parametrize("negative", [False, True])
def test_every_index_width_and_both_kinds_of_scales(threads, limit, negative):
    threads(2)
    dense = [random_matrix(70, 300, seed=s, step=0.2, negative=negative) for s in (1, 2)]
    matrices = parsed([*dense, plain(torch.zeros(70, 300))], limit=limit)
    assert {t.limit for t, _ in matrices} == {limit}
    x = inputs(matrices)
    y = matvec_pairs(matrices, x)
    assert torch.equal(y, one_by_one(matrices, x))
    assert not y[2].any()
    for i, m in enumerate(dense):
        exact = m.dequantize().double() @ x[i].double()
        assert (y[i] - exact).norm() <= 1e-5 * exact.norm()


def test_groups_with_different_tables_and_a_repeated_matrix(threads):
    threads(2)
    a, b = parsed([random_matrix(40, 90, step=0.1)], limit=10), parsed([random_matrix(40, 90)])
    matrices = [a[0], b[0], a[0]]
    x = inputs(matrices)
    assert torch.equal(matvec_pairs(matrices, x), one_by_one(matrices, x))


def test_callers_on_several_threads(threads):
    threads(2)
    matrices = parsed([random_matrix(260, 500, seed=s) for s in range(4)])
    x = inputs(matrices)
    expected = one_by_one(matrices, x)
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(matvec_pairs, matrices, x) for _ in range(64)]
        assert all(torch.equal(f.result(), expected) for f in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_works_alone(threads):
    threads(2)
    matrices = parsed([random_matrix(64, 100, seed=s) for s in range(2)])
    x = inputs(matrices)
    expected = matvec_pairs(matrices, x)  # its threads are not in the child
    child = os.fork()
    if not child:
        os._exit(0 if torch.equal(matvec_pairs(matrices, x), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_decodes_on_threads_of_its_own(threads, tmp_path):
    threads(2)
    (matrix,) = parsed([random_matrix(1024, 520)])  # two threads' worth
    expected = decode_dense(*matrix).numpy()
    child = os.fork()
    if not child:  # numpy compares: torch's own threads are not there either
        same = np.array_equal(decode_dense(*matrix).numpy(), expected)
        (tmp_path / "done").write_text(str(same))
        os._exit(0)
    deadline = time.monotonic() + 60  # the defect is a child that never ends
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.02)
    if not ended[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (tmp_path / "done").exists(), "the child hangs"
    assert (tmp_path / "done").read_text() == "True"


@pytest.mark.parametrize("rows", [1, 31, 63, 64, 65, 100])
@pytest.mark.parametrize("limit", [8, 10, 12])
@pytest.mark.parametrize("negative", [False, True])
def test_vector_code_equals_the_plain_loops_bit_for_bit(monkeypatch, rows, limit, negative):
    if not registers.AVAILABLE:
        pytest.skip("no AVX-512, or slow gathers")
    dense = [
        random_matrix(rows, c, seed=s, step=0.2 * s, negative=negative)
        for s, c in ((1, 1500), (9, 1500))
    ]
    matrices = parsed(dense, limit=limit)
    x = inputs(matrices)
    y = matvec_pairs(matrices, x)
    monkeypatch.setattr(pairs, "VECTORS", False)
    assert torch.equal(y, matvec_pairs(matrices, x))


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize(
    ("limit", "negative", "cols"), [(8, False, 1500), (8, True, 300), (11, True, 1100)]
)
def test_many_activations_are_each_alone_bit_for_bit(
    threads, monkeypatch, vectors, limit, negative, cols
):
    if vectors and not registers.AVAILABLE:
        pytest.skip("no AVX-512, or slow gathers")
    monkeypatch.setattr(pairs, "VECTORS", vectors)
    ((tables, matrix),) = parsed([random_matrix(71, cols, step=0.4, negative=negative)], limit)
    x = torch.randn(300, cols, generator=torch.Generator().manual_seed(7))
    threads(2)
    alone = matvec_pairs([(tables, matrix)] * len(x), x)
    for count in (1, 2):
        threads(count)
        for n in (0, 1, 2, 5, 16, 17, 33, 64, 100, 300):
            assert torch.equal(matvec(tables, matrix, x[:n]), alone[:n])


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize(
    ("limit", "negative", "rows", "cols"),
    [(8, False, 130, 1500), (8, True, 64, 90), (11, False, 3, 70)],
)
def test_few_activations_of_several_matrices_are_each_alone_bit_for_bit(
    threads, monkeypatch, vectors, limit, negative, rows, cols
):
    if vectors and not registers.AVAILABLE:
        pytest.skip("no AVX-512, or slow gathers")
    monkeypatch.setattr(pairs, "VECTORS", vectors)
    dense = [
        random_matrix(rows, cols, seed=s, step=0.3 * s, negative=negative) for s in range(1, 5)
    ]
    matrices, counts = parsed(dense, limit), [1, 2, 3, 4]
    x = torch.randn(10, cols, generator=torch.Generator().manual_seed(7))
    alone = matvec_pairs([m for m, n in zip(matrices, counts, strict=True) for _ in range(n)], x)
    for count in (1, 2):
        threads(count)
        assert torch.equal(matmul_few(matrices, counts, x), alone)


@pytest.mark.parametrize("limit", [8, 10, 12])
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(1, 5), (64, 300), (130, 1500), (700, 1100)])
def test_dense_weights_in_vector_code_are_the_matrix(threads, limit, negative, rows, cols):
    if not registers.AVAILABLE:
        pytest.skip("no AVX-512, or slow gathers")
    matrix = random_matrix(rows, cols, step=0.4, negative=negative)  # with columns of zeros
    ((tables, found),) = parsed([matrix], limit)
    exact = matrix.dequantize()
    for count in (1, 2):
        threads(count)
        for dtype in (torch.float32, torch.bfloat16):
            room = torch.full((4 * rows * cols + 8,), 0x7F, dtype=torch.uint8)
            assert torch.equal(dense_vectors(tables, found, dtype), exact.to(dtype))
            assert torch.equal(dense_vectors(tables, found, dtype, room), exact.to(dtype))
    x = torch.randn(5, cols, generator=torch.Generator().manual_seed(7))
    for dtype in (torch.float32, torch.bfloat16):  # twice: the kept memory has been used
        for _ in range(2):
            expected = F.linear(x.to(dtype), exact.to(dtype))
            found_y = matmul_dense(tables, found, x.to(dtype))
            torch.testing.assert_close(found_y, expected, rtol=0.02, atol=1e-4)


def test_payloads_are_views_of_the_blob():
    group = encode_group([random_matrix(64, 100)])
    tables = parse_tables(group.tables)
    blob = group.matrices[0]
    inside = parse_matrix(tables, blob).words.data_ptr() - blob.data_ptr()
    assert 0 < inside < blob.numel()
    moved = torch.empty(blob.numel() + 1, dtype=torch.uint8)[1:]
    moved.copy_(blob)  # at an odd address
    (a, b), x = (parse_matrix(tables, m) for m in (blob, moved)), torch.ones(1, 100)
    assert torch.equal(matvec(tables, a, x), matvec(tables, b, x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_points_to_its_own_arrays(duplicate):
    matrices = parsed([random_matrix(8, 30)])
    x = inputs(matrices)
    expected = matvec_pairs(matrices, x)
    before = matrices[0][0].addresses, matrices[0][1].addresses
    originals, matrices = matrices, duplicate(matrices)
    assert originals[0][1].addresses == before[1]  # alive, so that no address is used again
    assert not {*matrices[0][0].addresses[2:], *matrices[0][1].addresses[3:]} & {
        *before[0][2:],
        *before[1][3:],
    }
    assert torch.equal(matvec_pairs(matrices, x), expected)


def test_refused():
    matrices = parsed([random_matrix(4, 5), random_matrix(4, 5)])
    other = parsed([random_matrix(5, 5)])
    with pytest.raises(ValueError, match="one shape"):
        matvec_pairs([*matrices, *other], torch.zeros(3, 5))
    with pytest.raises(ValueError, match="one shape"):
        matvec_pairs([], torch.zeros(0, 5))
    for x in (torch.zeros(1, 5), torch.zeros(2, 4), torch.zeros(2, 5, dtype=torch.float64)):
        with pytest.raises(ValueError, match="float32"):
            matvec_pairs(matrices, x)
