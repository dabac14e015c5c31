"""`load`: a compressed checkpoint, checked whole, as a transformers model."""

import os
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedModel

from qmoe.errors import QmoeError, reason
from qmoe.inference.experts import Caches, EncodedExperts
from qmoe.inference.quantizer import OPENED
from qmoe.inference.structure import check
from qmoe.models.auto import auto_class
from qmoe.store.reader import Container
from qmoe.system.hub import split_revision


def load(
    directory: str | os.PathLike[str], *, cache_bytes: int | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Loads a compressed checkpoint as a transformers model.

    Args:
        directory: the compressed checkpoint, or the id of one on the Hugging Face hub,
            "owner/name" or "owner/name@revision" (downloaded whole first).
        cache_bytes: bound of decoded matrices kept in memory, 0 for none; default: environment
            variable QMOE_CACHE_BYTES, else 0.
        kwargs: for `from_pretrained`: dtype, device_map, offload_folder, ...

    Returns:
        A model in eval mode whose experts stay encoded.

    Raises:
        CorruptError: any file is not as it was written.
        FormatVersionError: another format version.
    """
    if not os.path.isdir(directory):
        directory = download(str(directory), kwargs.get("revision"))
    container = Container.open(directory)
    check(container)  # all this before transformers meets a damaged config
    token = OPENED.set(container)
    try:
        remote = bool(kwargs.get("trust_remote_code"))
        config = AutoConfig.from_pretrained(directory, trust_remote_code=remote)
        model: PreTrainedModel = auto_class(config).from_pretrained(directory, **kwargs)
    finally:
        OPENED.reset(token)
    if cache_bytes is not None:
        set_cache_bytes(model, cache_bytes)
    return model


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


def download(name: str, revision: str | None) -> str:
    """The local copy of a checkpoint on the hub, "owner/name" or "owner/name@revision".

    Raises:
        QmoeError: it cannot be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, at = split_revision(name)
    try:
        return str(snapshot_download(repo, revision=revision or at))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        raise QmoeError(
            f"{name} is no directory and cannot be fetched from the hub: {reason(e)}"
        ) from e
