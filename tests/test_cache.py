"""The bounded cache of decoded matrices."""

import copy
import threading

import pytest

from qmoe.inference.cache import ByteCache


def _get(cache, key, size, made):
    def make():
        made.append(key)
        return (key, size)

    value = cache.get(key, make, lambda v: v[1])
    assert value == (key, size)
    assert cache.used <= cache.capacity


def test_least_recently_used_goes_first():
    cache, made = ByteCache(10), []
    for key in ("a", "b", "a", "c", "a", "b"):  # room for two
        _get(cache, key, 5, made)
    assert made == ["a", "b", "c", "b"]


@pytest.mark.parametrize("capacity", [0, 4])
def test_what_does_not_fit_is_not_kept(capacity):
    cache, made = ByteCache(capacity), []
    for _ in range(3):
        _get(cache, "a", 5, made)
    assert (made, cache.used) == (["a"] * 3, 0)


def test_a_large_value_drives_out_several():
    cache, made = ByteCache(10), []
    for key, size in (("a", 3), ("b", 3), ("c", 3), ("d", 9), ("c", 3)):
        _get(cache, key, size, made)
    assert made == ["a", "b", "c", "d", "c"]
    assert cache.used == 3


def test_clear_and_copies_are_empty():
    cache = ByteCache(10)
    _get(cache, "a", 5, [])
    assert (copy.deepcopy(cache).used, copy.deepcopy(cache).capacity) == (0, 10)
    cache.clear()
    assert cache.used == 0
    with pytest.raises(ValueError, match="-1"):
        ByteCache(-1)


def test_many_threads_keep_the_bound():
    cache = ByteCache(50)

    def work(seed):
        for i in range(300):
            _get(cache, (seed * i) % 17, 1 + (seed * i) % 17, [])

    threads = [threading.Thread(target=work, args=(s,)) for s in (1, 3, 5, 7)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert cache.used == sum(size for _, size in cache._items.values()) <= 50
