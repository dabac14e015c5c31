"""Stored bits against the ideal, and the yardsticks themselves."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qmoe.codec import class_entropy_bits, encode_group, ideal_bits
from qmoe.codec.encoder.ideal import block_class_bits, scale_entropy_bits
from qmoe.measure.codec_bench import synthetic
from qmoe.measure.dictionary import ROW_BITS, build_trie, dictionary_bits
from qmoe.types import QuantizedMatrix, grid_index

TINY = Path(__file__).parent.parent / "examples" / "tiny-mixtral" / "model.safetensors"


def overhead(matrices):
    group = encode_group(matrices)
    return group.stored_bits / ideal_bits(matrices, group.scale_bits) - 1


@pytest.mark.parametrize("shape", [(2048, 768), (4096, 1024), (768, 3072)])
@pytest.mark.parametrize(("step", "bound"), [(1.0, 0.05), (2.9, 0.04), (4.2, 0.045), (6.2, 0.06)])
def test_overhead_on_real_shapes(shape, step, bound):
    """Between 2 and 0.3 bits; heavy columns reach |q| of 40 and more."""
    matrices = synthetic(*shape, step, count=1)
    assert matrices[0].codes.abs().max() > 20 or step > 5
    assert overhead(matrices) < bound


def experts(part):
    """Matrices of the example's first layer, float32 [8, rows, cols]."""
    tensors = load_file(TINY)
    name = "model.layers.0.block_sparse_moe.experts.{}." + part + ".weight"
    return [tensors[name.format(e)].float() for e in range(8)]


def fused(part):
    """gate_up [512, 256] or down [256, 256] of the eight experts."""
    if part == "down":
        return experts("w2")
    return [torch.cat(pair) for pair in zip(experts("w1"), experts("w3"), strict=True)]


@pytest.mark.parametrize("part", ["gate_up", "down"])
def test_overhead_of_ternary_experts(part):
    """Row minimum and maximum as levels, at full scale resolution: a scale index per sign."""
    matrices = []
    for w in fused(part):
        low, high = w.min(1).values, w.max(1).values
        codes = (w > high[:, None] / 2).to(torch.int8) - (w < low[:, None] / 2).to(torch.int8)
        col = torch.zeros(w.shape[1], dtype=torch.int16)
        matrices.append(QuantizedMatrix(codes, grid_index(high), col, grid_index(-low)))
    assert overhead(matrices) < 0.06


@pytest.mark.parametrize("part", ["gate_up", "down"])
@pytest.mark.parametrize(("step", "bound"), [(1.5, 0.06), (2.5, 0.08), (3.2, 0.11)])
def test_overhead_of_small_experts(part, step, bound):
    """Uniform steps, coarser for weak columns: 512 x 256 and 256 x 256, where side data is dear."""
    matrices = []
    for w in fused(part):
        col = grid_index(w.std() * (w.std(0) / w.std()).rsqrt(), step=16)
        codes = (w / (step * 2.0 ** (col.float() / 64))).round().clamp(-127, 127).to(torch.int8)
        row = grid_index(w.std(1) / w.std(), step=4)
        matrices.append(QuantizedMatrix(codes, row, col))
    assert overhead(matrices) < bound


def test_block_class_entropy_of_a_known_source():
    """Uniform steps, coarser for weak columns; in small matrices side data is dear."""
    rng = np.random.default_rng(0)
    codes = rng.choice(np.array([-1, 0, 1], np.int8), (640, 640), p=[0.1, 0.8, 0.1])
    zeros = torch.zeros(640, dtype=torch.int16)
    matrix = QuantizedMatrix(torch.from_numpy(codes), zeros, zeros)
    entropy = -(0.8 * math.log2(0.8) + 0.2 * math.log2(0.1))
    per_weight = block_class_bits([matrix]) / codes.size
    assert per_weight == pytest.approx(entropy + 4 / 1024, rel=0.02)
    assert class_entropy_bits([matrix]) / codes.size == pytest.approx(entropy, rel=0.01)
    assert scale_entropy_bits([matrix]) == 0
    assert ideal_bits([matrix], 100) == block_class_bits([matrix]) + 100


def test_block_classes_follow_energy():
    """Half the columns zero: 16 tables must not pay for them."""
    rng = np.random.default_rng(0)
    codes = rng.choice(np.array([-1, 0, 1], np.int8), (256, 512), p=[0.1, 0.8, 0.1])
    codes[:, ::2] = 0
    zeros = [torch.zeros(n, dtype=torch.int16) for n in codes.shape]
    bits = block_class_bits([QuantizedMatrix(torch.from_numpy(codes), *zeros)]) / codes.size
    assert bits == pytest.approx(0.922 / 2 + 4 / 1024, rel=0.03)


@pytest.mark.parametrize(("zero", "published"), [(0.75, 1.395), (0.885, 0.737), (0.95, 0.594)])
def test_dictionary_code_costs_what_it_should(zero, published):
    """Rates of QMoE's code on i.i.d. ternary rows of 2048, row data apart."""
    rng = np.random.default_rng(0)
    p = [(1 - zero) / 2, zero, (1 - zero) / 2]
    codes = torch.from_numpy(rng.choice(np.array([-1, 0, 1], np.int8), (256, 2048), p=p))
    matrix = QuantizedMatrix(codes, *(torch.zeros(n, dtype=torch.int16) for n in codes.shape))
    assert dictionary_bits([matrix]) / codes.numel() - ROW_BITS / 2048 == pytest.approx(
        published, rel=0.01
    )


def test_dictionary_strings_are_distinct_and_complete():
    child = build_trie()
    followed = child[child >= 0]
    assert np.array_equal(np.sort(followed), np.arange(1, len(child)))
    assert (child[0] > 0).all()
