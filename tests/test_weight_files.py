"""Weights in one file, in shards, beside a stale index, or of a type that is no weight: as
transformers reads them, or refused."""

import pytest
import torch
from checkpoints import same, shards, source_of, write_index
from safetensors.torch import load_file, save_file

from qmoe.errors import SourceError
from qmoe.models.streamed import StreamedModel
from qmoe.source.checkpoint import open_checkpoint


def test_a_whole_file_goes_before_an_index(tmp_path, tiny):
    source = tmp_path / "source"
    cls = source_of(tiny, source, "mixtral")
    tensors = load_file(source / "model.safetensors")
    write_index(source, shards(source, {n: t + 1 for n, t in tensors.items()}))
    same(source, cls)
    for file in source.glob("model-*"):
        file.unlink()  # the index is stale
    same(source, cls)


@pytest.mark.parametrize("case", ["subfolder", "unnamed", "ghost", "elsewhere", "twice"])
def test_what_the_shards_hold_counts_and_not_the_index(tmp_path, tiny, case):
    source = tmp_path / "source"
    cls = source_of(tiny, source, "mixtral")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    where = shards(source, tensors, "sub/" if case == "subfolder" else "")
    some = sorted(where)[0]
    if case == "unnamed":
        del where[some]
    elif case == "ghost":
        where["model.layers.9.ghost.weight"] = where[some]
    elif case == "elsewhere":
        where[some] = next(f for f in where.values() if f != where[some])
    elif case == "twice":  # the file whose name sorts last wins
        last = load_file(source / "model-1.safetensors")
        save_file({**last, some: tensors[some] + 1}, source / "model-1.safetensors")
    write_index(source, where)
    same(source, cls)


def test_files_outside_the_directory_are_refused(tmp_path, tiny):
    source = tmp_path / "source"
    source_of(tiny, source, "mixtral")
    (source / "model.safetensors").rename(tmp_path / "model.safetensors")
    write_index(source, {"lm_head.weight": "../model.safetensors"})
    with pytest.raises(SourceError, match="weight_map is missing or malformed"):
        open_checkpoint(source)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
@pytest.mark.parametrize("name", ["experts.1.down_proj.weight", "self_attn.q_proj.weight"])
def test_integers_for_floating_point_weights_are_refused(tmp_path, tiny, dtype, name):
    source = tmp_path / "source"
    source_of(tiny, source, "qwen3_moe")
    tensors = load_file(source / "model.safetensors")
    tiny.rewrite(source, {k: v.to(dtype) if k.endswith(name) else v for k, v in tensors.items()})
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(SourceError, match=rf"{name} holds {kind}.*lacks its quantization_config"):
        StreamedModel(open_checkpoint(source))
