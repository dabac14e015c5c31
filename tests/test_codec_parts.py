"""The codec's parts on their own: Huffman codes, symbols, side data, bit strings, geometry."""

import heapq

import numpy as np
import pytest

from qmoe.codec.encoder.table_choice import choose, cut
from qmoe.codec.format.bits import BitReader, BitWriter
from qmoe.codec.format.classes import column_order
from qmoe.codec.format.geometry import geometry
from qmoe.codec.format.huffman import canonical_codes, code_lengths, fill_lookup, is_complete
from qmoe.codec.format.sidedata import Field, fit_field, pack
from qmoe.codec.format.symbols import length_predictor, symbol_count, symbol_effects
from qmoe.errors import CorruptError


def huffman_cost(counts):
    """Total bits of an unlimited Huffman code: the sum of all merges."""
    heap = sorted(int(c) for c in counts if c)
    total = 0
    while len(heap) > 1:
        pair = heapq.heappop(heap) + heapq.heappop(heap)
        total += pair
        heapq.heappush(heap, pair)
    return total


def best_limited_cost(counts, limit):
    """Cheapest complete code of at most `limit` bits, by trying all shares of the Kraft sum."""
    counts = sorted((int(c) for c in counts if c), reverse=True)
    best = {1 << limit: 0}  # Kraft sum left -> cost
    for c in counts:
        following = {}
        for left, cost in best.items():
            for length in range(1, limit + 1):
                rest = left - (1 << (limit - length))
                if rest >= 0:
                    following[rest] = min(following.get(rest, 1 << 60), cost + c * length)
        best = following
    return best[0]


@pytest.mark.parametrize("seed", range(20))
def test_code_lengths_are_optimal(seed):
    rng = np.random.default_rng(seed)
    counts = rng.geometric(0.01 * (seed + 1), rng.integers(2, 60)).astype(np.int64)
    counts[rng.random(counts.size) < 0.2] = 0
    counts[:2] = 1, 7
    lengths = code_lengths(counts, 12)
    assert is_complete(lengths, 12)
    assert np.array_equal(lengths > 0, counts > 0)
    assert (counts * lengths).sum() == huffman_cost(counts)


@pytest.mark.parametrize("limit", [3, 4, 5])
def test_limited_code_lengths_are_optimal(limit):
    counts = np.array([1, 1, 2, 5, 13, 40, 120, 400], np.int64)
    lengths = code_lengths(counts, limit)
    assert is_complete(lengths, limit)
    assert lengths.max() == limit
    assert (counts * lengths).sum() == best_limited_cost(counts, limit)


def test_all_symbols_at_the_limit():
    lengths = code_lengths(np.arange(1, 257, dtype=np.int64) ** 6, 8)
    assert (lengths == 8).all()


@pytest.mark.parametrize("counts", [[0, 0], [5, 0, 0], [0, 0, 5], [3, 4]])
def test_codes_of_few_symbols_are_complete(counts):
    lengths = code_lengths(np.array(counts, np.int64), 8)
    assert is_complete(lengths, 8)
    assert all(lengths[i] for i, c in enumerate(counts) if c)


def test_incomplete_codes_are_noticed():
    for lengths in ([0, 0], [1, 0], [1, 1, 1], [2, 2, 2], [9, 9], [1, 15]):
        assert not is_complete(np.array(lengths, np.uint8), 8)


def test_lookup_inverts_codes():
    lengths = code_lengths(np.array([100, 50, 20, 0, 7, 3, 1, 1], np.int64), 8)
    codes, lookup = canonical_codes(lengths), fill_lookup(lengths, 8)
    for symbol in np.flatnonzero(lengths):
        for noise in range(1 << (8 - lengths[symbol])):
            entry = lookup[codes[symbol] | noise << lengths[symbol]]
            assert (entry >> 4, entry & 15) == (symbol, lengths[symbol])


def test_symbols_of_a_small_table():
    advance, value = symbol_effects(2, 2, 1)
    assert advance.tolist() == [2, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0]
    assert value.tolist() == [0, 1, -1, 2, -2, 1, -1, 2, -2, 1, -1]
    assert length_predictor(2, 2, 1).tolist() == [-1, 0, 1, 1, 3, 1, 5, 3, 7, 7, 9]
    assert symbol_count(2, 2, 1) == 11


@pytest.mark.parametrize(
    ("run", "value", "escapes"), [(1, 1, 0), (1, 127, 5), (62, 1, 5), (7, 3, 2)]
)
def test_predictors_come_first(run, value, escapes):
    source = length_predictor(run, value, escapes)
    assert source.size == symbol_count(run, value, escapes)
    assert (source < np.arange(source.size)).all()
    assert (source[1:] >= 0).all()


def round_trip(values, predictors=None, slopes=(0,)):
    field = fit_field(values, predictors, slopes)
    out = BitWriter()
    field.write(out)
    copy = Field.read(BitReader(out.words()))
    assert copy.base == field.base
    bits = 0
    for i, v in enumerate(values):
        p = predictors[i] if predictors else 0
        strings, widths = field.encode(v, p)
        used = int(widths.sum(dtype=np.int64))
        words = np.zeros(used // 32 + 4, np.uint32)
        assert pack(strings, widths, words) == used
        decoded, end = copy.decode(words, 0, v.size, p)
        assert np.array_equal(decoded, v)
        assert end == used
        bits += used
    return field, bits


def test_side_data_round_trips():
    rng = np.random.default_rng(0)
    for scale in (0, 1, 3, 100, 5000, 10**7):
        for step in (1, 4, 64):
            values = [rng.integers(-scale, scale + 1, n) * step for n in (1, 2, 77, 500)]
            round_trip([v.astype(np.int64) for v in values])


def test_constant_side_data_is_free():
    field, bits = round_trip([np.full(100, -77), np.full(3, -77)])
    assert (field.digits, bits) == (1, 0)


def test_nearly_constant_side_data_costs_less_than_a_bit_a_value():
    values = np.zeros(3000, np.int64)
    values[::50] = 3
    field, bits = round_trip([values])
    assert field.size > 1
    assert field.step == 3
    assert bits < 0.25 * values.size


def test_side_data_follows_its_predictor():
    rng = np.random.default_rng(0)
    cls = rng.integers(0, 20, 1000)
    field, bits = round_trip([-32 * cls + 4 * rng.integers(0, 2, 1000)], [cls], (0, 32, -32))
    assert field.slope == -32
    assert bits <= 1000


def test_side_data_beyond_the_words_is_refused():
    field = fit_field([np.arange(300)])
    with pytest.raises(CorruptError, match="runs over"):
        field.decode(np.zeros(4, np.uint32), 0, 300)


def test_bit_writer_refuses_what_does_not_fit():
    out = BitWriter()
    for value, width in ((4, 2), (-1, 5)):
        with pytest.raises(ValueError, match="does not fit"):
            out.put(value, width)
    out.put(5, 3)
    reader = BitReader(out.words())
    assert reader.get(3) == 5
    reader.finish()
    with pytest.raises(CorruptError, match="ends at bit"):
        reader.get(30)


def test_columns_sort_by_class_and_leave_out_zeros():
    order = column_order(np.array([3, 0, 5, 3, 5, 1], np.uint8))
    assert order.tolist() == [2, 4, 0, 3, 5]


def test_pieces_are_dealt_like_cards():
    classes = np.ones(1500, np.uint8)
    classes[7] = 9
    classes[100:102] = 0
    g = geometry(classes)
    assert (g.pieces, g.span) == (2, 750)
    assert g.slots[0, :3].tolist() == [1500, 7, 1]
    assert g.slots[1, :3].tolist() == [1500, 0, 2]
    assert g.slot_class[:, :2].tolist() == [[8, 0], [0, 0]]
    assert (np.sort(g.slots[g.slots < 1500]) == np.flatnonzero(classes)).all()


def test_kinds_follow_density():
    """Sparse contexts get long runs, dense ones single weights with large values."""
    histogram = np.zeros((63, 256), np.int64)
    histogram[5, [127, 128, 129]] = 100, 99_800, 100
    histogram[40, 128 - 20 : 128 + 21] = 2000
    first = cut(histogram)
    assert first == [0, 40]
    model = choose(histogram, first, 8, 20)
    assert model.kinds[0][0] > 30
    assert model.kinds[1][0] == 1
    assert model.kinds[1][1] > 8
    assert model.bits >= model.entropy
