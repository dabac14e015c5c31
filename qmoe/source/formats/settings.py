"""Where a checkpoint says how its weights are quantized, and what there would be misread."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qmoe.errors import SourceError

KEYS = ("quantization_config", "compression_config")
# Files in which quantizers wrote their settings before config.json was the place for them
FILES = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}
# Settings under which the stored weights are not those of the model: they belong to another basis
CHANGED_BASIS = (
    "transform_config",
    "rotation",
    "rotation_config",
    "hadamard_config",
    "hadamard_transform",
    "moe_sparsity_config",
    "adapter",
)


def quantization_settings(
    config: dict[str, Any], keys: tuple[str, ...] = KEYS
) -> dict[str, Any] | None:
    """The ``quantization_config`` of a model or of one of its parts; None for a plain checkpoint.

    Args:
        config: config.json.
        keys: under which the settings may stand.

    Raises:
        SourceError: they are no object, or two parts of the model have different ones.
    """
    found: list[tuple[str, dict[str, Any]]] = list(_search(config, keys, "config.json"))
    if found and any(f[1] != found[0][1] for f in found):
        raise SourceError(
            f"{found[0][0]} and {found[-1][0]} differ: a model of differently quantized parts is "
            "not supported; use the bf16 checkpoint"
        )
    if found:
        return found[0][1]
    mlx = config.get("quantization")
    if keys == KEYS and isinstance(mlx, dict) and "bits" in mlx:
        raise SourceError(
            f"config.json: quantization={mlx} is MLX's own format, which is not supported; use the "
            "bf16 checkpoint"
        )
    return None


def _search(
    part: dict[str, Any], keys: tuple[str, ...], where: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    for key in keys:
        if part.get(key):
            if not isinstance(part[key], dict):
                raise SourceError(f"{where}: {key} is {part[key]!r}, expected an object")
            yield f"{where}: {key}", part[key]
    for name, value in part.items():
        if isinstance(value, dict) and name not in keys:
            yield from _search(value, keys, f"{where}: {name}")


def settings_beside(directory: Path) -> dict[str, Any] | None:
    """Settings in a file of their own, as older quantizers wrote them; None if there is none.

    Raises:
        SourceError: such a file holds no JSON object.
    """
    for file, method in FILES.items():
        path = directory / file
        if not path.is_file():
            continue
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as e:
            raise SourceError(f"{path} cannot be read as JSON ({e}); download it again") from e
        if not isinstance(value, dict):
            raise SourceError(f"{path} holds a {type(value).__name__}, expected an object")
        if method == "modelopt":
            inner = value.get("quantization")
            return {"quant_method": method, **(inner if isinstance(inner, dict) else {})}
        if method == "awq":
            names = {"w_bit": "bits", "q_group_size": "group_size"}
            value = {names.get(k, k): v for k, v in value.items()}
        return {"quant_method": method, **value}
    return None


def without_settings(config: dict[str, Any]) -> dict[str, Any]:
    """config.json without quantization settings, in none of its parts: the tensors are dense."""
    return {
        k: without_settings(v) if isinstance(v, dict) else v
        for k, v in config.items()
        if k not in KEYS
    }


def refuse_changed_basis(settings: dict[str, Any]) -> None:
    """Refuses settings by which the weights on disk are not the model's own.

    Raises:
        SourceError: with the setting.
    """
    for key in CHANGED_BASIS:
        if settings.get(key):
            raise SourceError(
                f"quantization setting {key}={str(settings[key])[:120]} changes what the stored "
                "weights mean (they are transformed, pruned or completed by an adapter), which is "
                "not supported; use the bf16 checkpoint"
            )
    sparsity = settings.get("sparsity_config")
    form = sparsity.get("format", "dense") if isinstance(sparsity, dict) else "dense"
    if form != "dense":
        raise SourceError(
            f"quantization setting sparsity_config.format={form!r} is not supported (known: "
            "'dense'); use the bf16 checkpoint"
        )


def method_of(settings: dict[str, Any]) -> str:
    """The quantization method, as transformers infers it where it is not named."""
    method = settings.get("quant_method")
    if method is not None:
        return str(method)
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    if {"bits", "group_size"} <= set(settings):
        return "MLX's own"
    if settings.get("format") or settings.get("config_groups"):
        return "compressed-tensors"
    return "without a name"
