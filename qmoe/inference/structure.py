"""The model that a compressed checkpoint's config.json describes, without weights, against the
tensors that are stored.

Knows nothing about loading weights or running the model.
"""

from typing import Any

import torch
import transformers
from torch import nn

from qmoe.errors import CorruptError, UnsupportedModelError
from qmoe.inference.experts import Caches, EncodedExperts
from qmoe.models.auto import auto_class, building, model_class
from qmoe.models.families.find import kind_of, layout_of
from qmoe.models.matching import check_tables
from qmoe.store.reader import Container
from qmoe.types import ExpertsLayout


def build(container: Container, dtype: torch.dtype | None = None) -> Any:
    """The dense model on the meta device.

    Args:
        container: the checkpoint.
        dtype: of the parameters but those that the family keeps in another; by default the
            configuration's.

    Raises:
        CorruptError: config.json describes no model.
    """
    with building(container.directory, CorruptError):
        config = transformers.AutoConfig.from_pretrained(container.directory)
        del config.quantization_config
        dtype = dtype or config.dtype or torch.float32
        cls, config = model_class(config)
        with torch.device("meta"):
            if cls is not None:
                return cls._from_config(config, dtype=dtype)
            return auto_class(config).from_config(config, dtype=dtype)


def check(container: Container) -> None:
    """Proves that config.json and the stored tensors agree about every module, name and shape.

    A model whose code comes with the checkpoint is not built here, because that would run the code;
    whoever loads it with ``trust_remote_code`` gets the same comparison then.

    Raises:
        CorruptError: they do not agree.
    """
    known = container.config.get("model_type") in transformers.CONFIG_MAPPING
    if container.config.get("auto_map") and not known:
        return
    model = build(container)
    caches = Caches()
    with torch.device("meta"):
        for layout in container.modules.values():
            swap(model, layout, container, caches)
    compare(model, container)
    stored = sum(entry.end - entry.begin for _, _, entry in container.tensors.values())
    check_tables(container.directory, model, stored, CorruptError)


def check_class(model: Any, container: Container) -> None:
    """Compares the class that is being loaded with the one that was compressed.

    Raises:
        UnsupportedModelError: a text-only class of a model that was compressed with its vision
            tower, say, whose tensors have other names.
    """
    names = container.config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if isinstance(name, str) and hasattr(transformers, name) and type(model).__name__ != name:
        raise UnsupportedModelError(
            f"{container.directory} was compressed as {name}, not as {type(model).__name__}; load "
            f"it with transformers.{name} or qmoe.load"
        )


def swap(model: Any, layout: ExpertsLayout, container: Container, caches: Caches) -> None:
    """Puts encoded experts, on the current default device, in the place of a model's own.

    Raises:
        CorruptError: the model has no such experts module or one of another shape.
    """
    try:
        host: nn.Module = model.get_submodule(layout.path)
    except AttributeError as e:
        raise CorruptError(
            f"config.json lists {layout.path}, which {type(model).__name__} lacks"
        ) from e
    if kind_of(host) is None:
        raise CorruptError(f"config.json lists {layout.path}, which is a {type(host).__name__}")
    found = layout_of(layout.path, host)
    if found != layout:
        raise CorruptError(
            f"{layout.path}: the model has {found}, quantization_config has {layout}"
        )
    size = container.tensors[f"{layout.path}.stream"][2].shape[0]
    held = [container.tensors[f"{layout.path}.{leaf}"][0] for leaf in ("stream", "offsets")]
    identity = tuple(container.manifest["files"][file]["sha256"] for file in held)
    model.set_submodule(layout.path, EncodedExperts(host, layout, size, caches, identity))
    # Some families (switch) initialise an experts module's matrices from its parent. Nothing is
    # left to initialise: `compare` proves that every tensor is stored.
    parent = model.get_submodule(layout.path.rpartition(".")[0])
    parent._is_hf_initialized = True


def compare(model: Any, container: Container) -> None:
    """Compares names and shapes of a model's tensors with the stored ones.

    transformers would fill what is missing with random numbers and drop what is left over.

    Raises:
        CorruptError: with the names or shapes that differ.
    """
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    stored = {name: entry.shape for name, (_, _, entry) in container.tensors.items()}
    for name, geometry in container.dense.items():
        for tensor in geometry.tensors:
            del stored[tensor]
        stored[name] = (geometry.rows, geometry.cols)
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    if missing := sorted(wanted.keys() - stored.keys() - tied):
        raise CorruptError(f"{container.directory} lacks {len(missing)} tensors: {missing[:3]}")
    if extra := sorted(stored.keys() - wanted.keys()):
        raise CorruptError(f"{container.directory} has tensors that the model lacks: {extra[:3]}")
    for name, shape in stored.items():
        if shape != wanted[name]:
            raise CorruptError(f"{name} is stored as {shape}, config.json asks for {wanted[name]}")
