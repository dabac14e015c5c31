"""Names of models on the hub, and what its library raises."""

from typing import cast

from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)

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
