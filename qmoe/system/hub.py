"""Names of models on the hub, and what its library raises."""

import os
from typing import cast

from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from qmoe.errors import QmoeError, reason

# What calls of huggingface_hub raise. The HTTP library below it has changed its name twice; the
# base of its errors is what huggingface_hub's own derive from.
FAILURES = (
    cast(type[Exception], HfHubHTTPError.__bases__[0]),
    HfHubHTTPError,
    LocalEntryNotFoundError,
    EntryNotFoundError,
    HFValidationError,
    OSError,
    ValueError,
)


def split_revision(model: str) -> tuple[str, str | None]:
    """The repository and the branch, tag or commit of "owner/name" or "owner/name@revision"."""
    name, _, revision = model.partition("@")
    return name, revision or None


def download(name: str, revision: str | None) -> str:
    """Fetches a whole repository of the hub, or finds it in the hub's cache.

    Args:
        name: "owner/name" or "owner/name@revision".
        revision: wins over the one in the name.

    Returns:
        The directory.

    Raises:
        QmoeError: there is no such repository, or it cannot be reached.
    """
    from huggingface_hub import snapshot_download

    if os.path.isfile(name):
        raise QmoeError(f"{name} is a file; give the directory that it is in")
    repo, at = split_revision(name)
    try:
        return str(snapshot_download(repo, revision=revision or at))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        raise QmoeError(
            f"{name} is no directory and cannot be fetched from the hub: {reason(e)}"
        ) from e
