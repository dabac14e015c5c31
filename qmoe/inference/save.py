"""``model.save_pretrained`` of a loaded compressed model: the same format again, with a manifest
of its own.

Tensors are fetched one at a time from wherever offloading put them. Knows nothing about how a
model is loaded.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.accelerate import load_offloaded_parameter

from qmoe.errors import CorruptError, OutputError
from qmoe.models.classes import plain_config
from qmoe.store.block import BlockWriter
from qmoe.store.reader import Container
from qmoe.store.stored_dense import OFFSETS, STREAM
from qmoe.store.stored_experts import StoredExperts
from qmoe.store.writer import CARRIED_BLOCK, MAX_SHARD_BYTES, ContainerWriter, carried_files

_UPLOAD = "a compressed model saves its own tensors to a directory; upload that with `hf upload`"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def save_pretrained(
    model: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = MAX_SHARD_BYTES,
    **_: Any,
) -> None:
    """Writes the model, its config and its generation config; bound to every loaded model as
    ``model.save_pretrained``.

    Dense matrices that were stored encoded are so again: their bytes are copied from where the
    model was loaded, if it still has the values that they decode to; one that was changed, also in
    its dtype, is stored as it is.

    As in transformers, the tokenizer is saved by its own method. Files of these names in the
    directory are replaced.

    Args:
        model: loaded from a compressed checkpoint.
        save_directory: created if it does not exist; not the one that the model was loaded from.
        is_main_process: other processes write nothing.
        state_dict: not supported; the model's own tensors are written.
        push_to_hub: not supported; upload the directory.
        max_shard_size: bytes, or text such as "4GB".

    Raises:
        OutputError: the directory cannot be written or is the model's source, an unsupported
            argument is given, or encoded dense matrices cannot be read again.
    """
    if not is_main_process:
        return
    if state_dict is not None or push_to_hub:
        raise OutputError(_UPLOAD)
    source, manifest = Path(model.qmoe_directory), model.qmoe_manifest
    container = _source(source, manifest, save_directory)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    bound = _bytes(max_shard_size)
    with ContainerWriter(save_directory, replace=True, max_shard_bytes=bound) as writer:
        try:
            for block, files in manifest["blocks"].items():
                names = sorted(n for n, e in manifest["tensors"].items() if e["file"] in files)
                if block == CARRIED_BLOCK:
                    _save_carried(writer, names, source)
                else:
                    _save_block(writer, block, names, model, container)
            writer.finish(
                list(manifest["blocks"]),
                config=plain_config(model.config),
                settings=manifest["settings"],
                versions=manifest["versions"],
                source=manifest["source"],
                report=manifest["report"],
                files=_small_files(model, source),
            )
        except BaseException:
            writer.discard()  # a copy is begun anew rather than resumed
            raise


def _small_files(model: Any, source: Path) -> dict[str, bytes]:
    """The licence of what the model was loaded from, and its own generation settings."""
    small: dict[str, bytes] = {}
    if source.is_dir():
        carried = carried_files(source)
        small = {k: v for k, v in carried.items() if k.startswith(("LICENSE", "NOTICE"))}
    if model.can_generate():
        small["generation_config.json"] = model.generation_config.to_json_string().encode()
    return small


def _source(
    directory: Path, manifest: dict[str, Any], target: str | os.PathLike[str]
) -> Container | None:
    """The checkpoint behind a model with encoded dense matrices, proved to be the same still, and
    not the target."""
    if os.path.isdir(target) and directory.is_dir() and directory.samefile(target):
        raise OutputError(f"{target} is what the model was loaded from; save it somewhere else")
    if not manifest["report"].get("dense"):
        return None
    try:
        container = Container.open(directory)
    except CorruptError as e:
        raise OutputError(
            f"the model's encoded dense weights are copied from {directory}, which is not there "
            f"or not sound any more: {e}"
        ) from e
    if container.manifest["tensors"] != manifest["tensors"]:
        raise OutputError(
            f"{directory} was replaced after the model was loaded from it; load it again"
        )
    return container


def _save_block(
    writer: ContainerWriter,
    name: str,
    tensors: list[str],
    model: Any,
    container: Container | None,
) -> None:
    report = model.qmoe_manifest["report"]["modules"]
    with writer.block(name) as block:
        for tensor in tensors:
            path, _, leaf = tensor.rpartition(".")
            if path in report and leaf == "stream":
                layout = model.get_submodule(path).layout
                streams = StoredExperts(
                    layout, fetch(model, tensor), fetch(model, f"{path}.offsets")
                )
                block.add_encoded(streams, report[path])
            elif container is not None and path in container.dense and leaf == STREAM:
                _save_dense(block, path, fetch(model, path), container)
            elif leaf not in ("offsets", OFFSETS) or path not in {*report, *_dense(container)}:
                block.add_tensor(tensor, fetch(model, tensor))  # offsets go with their stream


def _dense(container: Container | None) -> list[str]:
    return [] if container is None else list(container.dense)


def _save_dense(block: BlockWriter, name: str, weight: Tensor, container: Container) -> None:
    coded = container.dense_matrix(name)
    if weight.dtype == torch.int8:
        if not torch.equal(coded.integers().codes, weight):
            raise OutputError(
                f"the integers of {name} were changed; they have no other stored form"
            )
        block.add_dense_encoded(coded, container.manifest["report"]["dense"][name])
    elif torch.equal(coded.decode(weight.dtype), weight):
        block.add_dense_encoded(coded, container.manifest["report"]["dense"][name])
    else:
        block.add_tensor(name, weight)


def _save_carried(writer: ContainerWriter, names: list[str], source: Path) -> None:
    """Copies what the model has no module for from where the model was loaded."""
    if not source.is_dir():
        raise OutputError(
            f"{len(names)} tensors that no module takes are in {source}, which is gone; "
            "put it back to save the whole checkpoint"
        )
    container = Container.open(source, check=False)
    with writer.block(CARRIED_BLOCK) as block:
        for name in names:
            block.add_tensor(name, container.read(name))


def fetch(model: Any, name: str) -> Tensor:
    """One tensor of a model on the CPU, wherever it lives now."""
    tensor: Tensor = model.get_parameter_or_buffer(name)
    if tensor.device.type == "meta":
        tensor = load_offloaded_parameter(model, name)
    return tensor.detach().to("cpu")


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    number, unit = size[:-2].strip(), size[-2:].upper()
    if unit not in _UNITS or not number.replace(".", "", 1).isdecimal():
        raise OutputError(f"max_shard_size is {size!r}; write it like 4GB or as a number of bytes")
    return int(float(number) * _UNITS[unit])
