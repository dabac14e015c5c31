"""The heap gives its holes back."""

import platform
import resource

import pytest

from qmoe import heap


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as f:
        return int(f.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps its own")
def test_holes_are_given_back() -> None:
    size, count = 20_000, 5_000
    blocks = [bytearray(b"x") * size for _ in range(count)]
    kept = blocks[::50]  # holes between what lives on
    full = _resident()
    del blocks
    assert heap.trim()
    assert full - _resident() > size * count // 2
    assert all(block == bytearray(b"x") * size for block in kept)
