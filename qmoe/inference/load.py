"""`load`: a compressed checkpoint, checked whole, as a transformers model."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedModel

from qmoe.inference.experts import Caches, EncodedExperts
from qmoe.inference.quantizer import INTEGERS, OPENED
from qmoe.inference.structure import check
from qmoe.models.auto import auto_class, model_class
from qmoe.store.reader import Container
from qmoe.system.hub import download


def load(
    directory: str | os.PathLike[str],
    *,
    cache_bytes: int | None = None,
    integers: bool = True,
    **kwargs: Any,
) -> PreTrainedModel:
    """Loads a compressed checkpoint as a transformers model.

    Args:
        directory: the compressed checkpoint, or the id of one on the Hugging Face hub,
            "owner/name" or "owner/name@revision" (downloaded whole first).
        cache_bytes: bound of decoded matrices kept in memory, 0 for none; default: environment
            variable QMOE_CACHE_BYTES, else 0.
        integers: on a machine without a GPU, matrices that ``--dense-bits 4`` or 3 coded stay 8-bit
            integers (`IntegerLinear`), exact to what is stored; False decodes them into ordinary
            weights of the model's dtype, which can be changed.
        kwargs: for `from_pretrained`: dtype, device_map, offload_folder, ...

    Returns:
        A model in eval mode whose experts stay encoded.

    Raises:
        CorruptError: any file is not as it was written.
        FormatVersionError: another format version.
    """
    with verified(directory, kwargs.get("revision")) as container:
        where = container.directory
        remote = bool(kwargs.get("trust_remote_code"))
        config = AutoConfig.from_pretrained(where, trust_remote_code=remote)
        cls = model_class(config)[0] or auto_class(config)
        kept = INTEGERS.set(integers)
        try:
            model: PreTrainedModel = cls.from_pretrained(where, **kwargs)
        finally:
            INTEGERS.reset(kept)
    if cache_bytes is not None:
        set_cache_bytes(model, cache_bytes)
    return model


@contextmanager
def verified(directory: str | os.PathLike[str], revision: str | None = None) -> Iterator[Container]:
    """Opens and verifies a compressed checkpoint; what transformers loads from it in the meantime
    is not verified a second time.

    Args:
        directory: or the id of a repository on the hub, which is downloaded whole.
        revision: of the repository.

    Raises:
        CorruptError: any file is not as it was written.
        FormatVersionError: another format version.
    """
    if not os.path.isdir(directory):
        directory = download(str(directory), revision)
    container = Container.open(directory)
    check(container)  # all this before transformers meets a damaged config
    token = OPENED.set(container)
    try:
        yield container
    finally:
        OPENED.reset(token)


def set_cache_bytes(model: nn.Module, cache_bytes: int) -> None:
    """Changes the bound of decoded matrices that a loaded model keeps; what it holds now is
    dropped.

    Raises:
        ValueError: negative.
    """
    caches = Caches(cache_bytes)
    for module in model.modules():
        if isinstance(module, EncodedExperts):
            module.caches = caches
            caches.expect(module.stream.numel())
