"""Random damage to any file of a compressed checkpoint: always an error of ours, never a crash, a
hang or a silent change."""

import random
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import qmoe
from qmoe.errors import QmoeError
from qmoe.publish.verify import check_stream, verify
from qmoe.store.reader import Container
from qmoe.store.stored_experts import StoredExperts


@pytest.fixture
def target(compressed, tmp_path):
    out = tmp_path / "c"
    shutil.copytree(compressed[0], out)
    return out


def _damage(rng, data):
    """One of: a flipped bit, another byte, a cut end, a longer end, two bytes swapped, a byte
    inserted or removed."""
    data = bytearray(data)
    at = rng.randrange(len(data))
    kind = rng.randrange(10)
    if kind < 5:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 5:
        data[at] = (data[at] + rng.randrange(1, 256)) % 256
    elif kind == 6:
        del data[at:]
    elif kind == 7:
        data += rng.randbytes(rng.randrange(1, 9))
    elif kind == 8:
        data.insert(at, rng.randrange(256))
    else:
        del data[at]
    return bytes(data)


def _attack(target, cases, seed, read):
    rng = random.Random(seed)
    files = sorted(p for p in target.iterdir())
    good = {p: p.read_bytes() for p in files}
    for case in range(cases):
        # Every file alike, but small ones are where the structure is.
        path = files[case % len(files)]
        data = _damage(rng, good[path])
        if data == good[path]:  # an inserted byte beside its equal
            continue
        path.write_bytes(data)
        with pytest.raises(QmoeError) as caught:
            read(target)
        assert "\n" not in str(caught.value)
        path.write_bytes(good[path])
    read(target)


def test_verify_catches_random_damage(target):
    _attack(target, 560, 1, verify)


def test_load_catches_random_damage(target):
    _attack(target, 140, 2, qmoe.load)


@pytest.mark.slow
def test_verify_and_load_catch_random_damage_10000(target):
    _attack(target, 9000, 3, verify)
    _attack(target, 1000, 4, qmoe.load)


def test_from_pretrained_never_loads_damage(target):
    """transformers reads config.json before we are asked, so some errors there are its own;
    silence would be the fault."""
    rng = random.Random(5)
    files = sorted(target.iterdir())
    for case in range(100):
        path = files[case % len(files)]
        good = path.read_bytes()
        path.write_bytes(_damage(rng, good))
        if path.read_bytes() != good:
            with pytest.raises((QmoeError, OSError, ValueError, KeyError, TypeError)):
                AutoModelForCausalLM.from_pretrained(target)
        path.write_bytes(good)


def test_streams_that_no_checksum_protects(compressed):
    """The same attack below all checksums of the container: the codec's own validation, directly
    in memory."""
    rng = random.Random(6)
    container = Container.open(compressed[0])
    whole = container.experts("model.layers.0.mlp.experts")
    good = whole.stream.clone()
    for _ in range(400):
        stream = good.clone()
        for _ in range(rng.randrange(1, 4)):
            stream[rng.randrange(len(stream))] ^= 1 << rng.randrange(8)
        if torch.equal(stream, good):
            continue
        with pytest.raises(QmoeError):
            check_stream(StoredExperts(whole.layout, stream, whole.offsets))


def test_offsets_that_point_elsewhere(compressed):
    """Ranges that are valid but belong to something else: tables read as matrices, matrices of
    other groups."""
    rng = random.Random(7)
    container = Container.open(compressed[0])
    whole = container.experts("model.layers.0.mlp.experts")
    ends = sorted(set(whole.offsets.flatten().tolist()))
    for _ in range(200):
        offsets = whole.offsets.clone()
        e, j, k = rng.randrange(4), rng.randrange(2), rng.randrange(2)
        a, b = sorted(rng.sample(ends, 2))
        before = offsets[e, j, 2 * k : 2 * k + 2].tolist()
        if [a, b] == before:
            continue
        offsets[e, j, 2 * k : 2 * k + 2] = torch.tensor([a, b])
        streams = StoredExperts(whole.layout, whole.stream, offsets)
        try:
            check_stream(streams)
        except QmoeError:
            continue
        # Accepted only if it is another sound matrix of the same group and shape.
        assert offsets[e, j, :2].tolist() == whole.offsets[e, j, :2].tolist()
        assert [a, b] in whole.offsets[:, j, 2:].tolist()
