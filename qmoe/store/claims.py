"""What a manifest claims, checked for types and ranges before anything believes it.

A checksum proves that a file is as its writer left it, not that the writer told the truth. Nothing
here opens a file; `qmoe.store.reader` compares the claims with headers and geometry.
"""

import math
import re
from collections.abc import Callable
from typing import Any

from qmoe.errors import CorruptError
from qmoe.types import ExpertsLayout

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST = 1 << 62  # bytes, weights, tokens
Claim = Callable[[Any], bool]


def count(value: Any) -> bool:
    """Whether a value is a number of things: an integer, no bool, not negative, not absurd."""
    return type(value) is int and 0 <= value <= _MOST


def amount(value: Any) -> bool:
    """Whether a value is a finite number >= 0."""
    return type(value) in (int, float) and 0 <= value <= _MOST and math.isfinite(value)


def text(value: Any) -> bool:
    """Whether a value is a text that can be written in UTF-8."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_manifest(document: dict[str, Any], where: str) -> None:
    """Checks everything in a manifest that the rest of the package reads.

    Args:
        document: JSON values.
        where: name of the file for messages.

    Raises:
        CorruptError: with the place and the value.
    """
    claims = _Claims(where)
    for key in ("files", "tensors", "blocks", "settings", "versions", "source", "report"):
        claims.object(document, key, key)
    for name, entry in document["files"].items():
        if not text(name) or "/" in name or name in ("", ".", "..") or "\0" in name:
            raise CorruptError(f"{where} lists {name!r:.200}, which is not a file name")
        claims.entry(entry, f"files[{name!r}]", {"bytes": count, "sha256": _is_sha256})
    for name, entry in document["tensors"].items():
        claims.name(name)
        claims.entry(entry, f"tensors[{name!r}]", {"file": text, "sha256": _is_sha256})
    listed: list[str] = []
    for name, files in document["blocks"].items():
        claims.name(name)
        if not isinstance(files, list) or not all(text(f) for f in files):
            claims.refuse(f"blocks[{name!r}]", files)
        listed += files
    shards = sorted(f for f in document["files"] if f.endswith(".safetensors"))
    if sorted(listed) != shards:
        raise CorruptError(
            f"{where}: blocks list {len(listed)} weight files, files {len(shards)}; each must be "
            "in one block"
        )
    for name, version in document["versions"].items():
        if not text(name) or not text(version):
            claims.refuse(f"versions[{name!r}]", version)
    _check_source(claims, document["source"])
    _check_report(claims, document["report"])


def _check_source(claims: "_Claims", source: dict[str, Any]) -> None:
    known: dict[str, Claim] = {"bytes": count, "name": text, "revision": text}
    for key in known.keys() & source.keys():
        if not known[key](source[key]):
            claims.refuse(f"source[{key!r}]", source[key])
    if "revision" in source and "name" not in source:
        claims.refuse("source", source)


def _check_report(claims: "_Claims", report: dict[str, Any]) -> None:
    claims.object(report, "modules", "report.modules")
    for path, module in report["modules"].items():
        claims.name(path)
        place = f"report.modules[{path!r}]"
        keys: dict[str, Claim] = {
            "tokens": lambda v: v is None or _all(v, count),
            "notes": lambda v: v is None or _all(v, text),
            "projections": lambda v: isinstance(v, dict),
        }
        claims.entry(module, place, keys)
        for name, p in module["projections"].items():
            sizes: dict[str, Claim] = dict.fromkeys(("weights", "bytes", "zeros"), count)
            claims.entry(p, f"{place}.projections[{name!r}]", sizes | {"ideal_bits": amount})
    for name, entry in claims.optional(report, "dense", "report.dense").items():
        claims.name(name)
        if not isinstance(entry, dict):
            claims.refuse(f"report.dense[{name!r}]", entry)
    for fate, number in claims.optional(report, "tensors", "report.tensors").items():
        claims.name(fate)
        if not count(number):
            claims.refuse(f"report.tensors[{fate!r}]", number)
    if not count(report.get("carried_weights", 0)):
        claims.refuse("report.carried_weights", report["carried_weights"])


def check_module(path: str, report: Any, layout: ExpertsLayout) -> None:
    """Compares the report of an experts module with its geometry.

    Args:
        path: of the module.
        report: its entry, checked by `check_manifest`; None if there is none.
        layout: from config.json.

    Raises:
        CorruptError: they disagree.
    """
    if report is None:
        raise CorruptError(f"the manifest reports nothing of {path}")
    for key in ("tokens", "notes"):
        if report[key] is not None and len(report[key]) != layout.experts:
            raise CorruptError(
                f"{path}: {len(report[key])} {key} are reported of {layout.experts} experts"
            )
    weights = {p.name: layout.experts * p.rows * p.cols for p in layout.projections}
    found = {name: entry["weights"] for name, entry in report["projections"].items()}
    if found != weights:
        raise CorruptError(f"{path}: weights {found} are reported, config.json has {weights}")
    for name, entry in report["projections"].items():
        if entry["zeros"] > entry["weights"]:
            raise CorruptError(f"{path} {name}: {entry['zeros']} zeros of {entry['weights']}")


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _all(value: Any, claim: Claim) -> bool:
    return isinstance(value, list) and all(claim(v) for v in value)


class _Claims:
    """Says where in a manifest a claim is no good."""

    def __init__(self, where: str) -> None:
        self.where = where

    def refuse(self, place: str, value: Any) -> None:
        raise CorruptError(f"{self.where}: {place} is {value!r:.200}")

    def name(self, name: str) -> None:
        if not text(name) or not name:
            self.refuse("a name", name)

    def object(self, parent: dict[str, Any], key: str, place: str) -> None:
        if not isinstance(parent.get(key), dict):
            kind = type(parent.get(key)).__name__
            raise CorruptError(f"{self.where}: {place} is {kind}, not an object")

    def optional(self, parent: dict[str, Any], key: str, place: str) -> dict[str, Any]:
        """An object that may be absent or null."""
        if parent.get(key) is None:
            return {}
        self.object(parent, key, place)
        found: dict[str, Any] = parent[key]
        return found

    def entry(self, value: Any, place: str, keys: dict[str, Claim]) -> None:
        """An object with at least these keys, each fulfilling its claim."""
        if not isinstance(value, dict):
            self.refuse(place, value)
        for key, claim in keys.items():
            if key not in value or not claim(value[key]):
                self.refuse(f"{place}.{key}", value.get(key))
