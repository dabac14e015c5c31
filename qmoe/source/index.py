"""Which files of a checkpoint hold its weights and its configuration, and reading their index."""

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from qmoe.errors import SourceError
from qmoe.source.shards import Shard

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")


def weight_files(files: set[str], where: str, named: object = None) -> tuple[str | None, str]:
    """(single weight file or None, index file), in transformers' order of preference: a whole file
    before an index beside it, which may be of another time.

    Args:
        files: names in the directory.
        where: the directory, for messages.
        named: `transformers_weights` of config.json, which goes before all.
    """
    if named is not None:
        if not isinstance(named, str) or named not in files:
            raise SourceError(
                f"{where}: config.json names the weights {named!r} (transformers_weights), which "
                "are not there; download them or remove the entry"
            )
        return (None, named) if named.endswith(".index.json") else (named, "")
    for index, single in zip(INDEXES, SINGLES, strict=True):
        if single in files:
            return single, ""
        if index in files:
            return None, index
    found = sorted(f for f in files if f.endswith(".safetensors"))
    if len(found) == 1 and not found[0].startswith("qmoe"):
        return found[0], ""
    if any(f.startswith("qmoe") for f in found):
        raise SourceError(
            f"{where} is already compressed by qmoe; give the original, or `qmoe export` it first"
        )
    if found:
        raise SourceError(
            f"{where} holds {len(found)} safetensors files ({found[0]}, …) but no {INDEXES[0]}; "
            "download the index"
        )
    raise SourceError(f"{where} holds no weights (looked for {', '.join((*SINGLES, *INDEXES))})")


def read_index(path: Path, shard: Callable[[str], Shard]) -> tuple[list[Shard], dict[str, Shard]]:
    """All shards that an index names, in the order of their names, and for every tensor its own.

    Args:
        path: the index.
        shard: opens a file by its name.

    Raises:
        SourceError: it is no index.
    """
    index = _read_json(path)[0]
    weights = index.get("weight_map")
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(isinstance(v, str) and _inside(v) for v in weights.values())
    ):
        raise SourceError(f"{path}: weight_map is missing or malformed; download the index again")
    shards = {name: shard(name) for name in sorted(set(weights.values()))}
    return list(shards.values()), {name: shards[file] for name, file in weights.items()}


def _inside(file: str) -> bool:
    """Whether an index's file lies in its directory or below."""
    path = PurePosixPath(file)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts


def read_config(directory: Path) -> tuple[dict[str, Any], str]:
    """config.json of a checkpoint, parsed and as text.

    Raises:
        SourceError: there is none, or it is no JSON object.
    """
    if not (directory / "config.json").is_file():
        raise SourceError(
            f"{directory} holds no config.json; give the directory of a transformers checkpoint"
        )
    return _read_json(directory / "config.json")


def _read_json(path: Path) -> tuple[dict[str, Any], str]:
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
    except (OSError, ValueError, RecursionError) as e:
        raise SourceError(f"{path} cannot be read as JSON ({e}); download it again") from e
    if not isinstance(value, dict):
        raise SourceError(f"{path} holds a {type(value).__name__}, expected an object")
    return value, text
