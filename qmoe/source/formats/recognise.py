"""From a config's ``quantization_config`` to the virtual dense tensors of a checkpoint."""

from typing import Any

from qmoe.errors import SourceError
from qmoe.source.formats import fp8, int4, mxfp4
from qmoe.source.formats.virtual import Raw, Virtual

KNOWN = "fp8, fbgemm_fp8, mxfp4, gptq, compressed-tensors (pack-quantized, float-quantized)"


KEYS = ("quantization_config", "compression_config")


def quantization_settings(
    config: dict[str, Any], keys: tuple[str, ...] = KEYS
) -> dict[str, Any] | None:
    """The ``quantization_config`` of a model or of its text part; None for a plain checkpoint.

    Args:
        config: config.json.
        keys: under which the settings may stand.

    Raises:
        SourceError: they are no object.
    """
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in keys:
            if part.get(key):
                settings = part[key]
                if not isinstance(settings, dict):
                    raise SourceError(f"config.json: {key} is {settings!r}, expected an object")
                return settings
    return None


def recognise(raw: Raw, settings: dict[str, Any]) -> tuple[str, dict[str, Virtual], set[str]]:
    """Virtual dense tensors of a quantized checkpoint.

    Args:
        raw: stored tensors.
        settings: the config's ``quantization_config``.

    Returns:
        (format name, virtual tensors by dense name, names that they hide).

    Raises:
        SourceError: the method or one of its settings is not supported; both are named.
    """
    method = settings.get("quant_method")
    if method == "qmoe":
        raise SourceError(
            "this checkpoint is already compressed by qmoe; give the original, or `qmoe export` "
            "it first"
        )
    if method == "fp8":
        return "fp8", *fp8.recognise(raw, _block(settings.get("weight_block_size")))
    if method == "fbgemm_fp8":
        return "fp8", *fp8.recognise(raw, None)
    if method == "mxfp4":
        return "mxfp4", *mxfp4.recognise(raw)
    if method == "gptq":
        bits, group = settings.get("bits"), settings.get("group_size", -1)
        version = settings.get("checkpoint_format", "gptq")
        if (
            bits not in int4.WIDTHS
            or not isinstance(group, int)
            or group == 0
            or version not in ("gptq", "gptq_v2")
        ):
            raise SourceError(
                f"GPTQ with bits={bits!r}, group_size={group!r}, checkpoint_format={version!r} is "
                "not supported "
                f"(bits {int4.WIDTHS}, formats gptq and gptq_v2); use the bf16 checkpoint"
            )
        return f"gptq int{bits}", *int4.recognise_gptq(raw, bits, group, int(version == "gptq"))
    if method == "compressed-tensors":
        return _compressed_tensors(raw, settings)
    raise SourceError(
        f"quantization method {method!r} of the source is not supported (known: {KNOWN}); use the "
        "bf16 checkpoint"
    )


def _compressed_tensors(
    raw: Raw, settings: dict[str, Any]
) -> tuple[str, dict[str, Virtual], set[str]]:
    form = settings.get("format")
    groups = settings.get("config_groups")
    weights = [g.get("weights") or {} for g in groups.values()] if isinstance(groups, dict) else []
    kinds = {
        (w.get("num_bits"), w.get("type"), w.get("symmetric", True), w.get("strategy"))
        for w in weights
    }
    if len(kinds) == 1:
        bits, kind, symmetric, strategy = next(iter(kinds))
        if (
            form == "pack-quantized"
            and bits in int4.WIDTHS
            and kind == "int"
            and symmetric
            and strategy in ("group", "channel")
        ):
            return f"int{bits}", *int4.recognise_packed(raw, bits)
        if form in ("float-quantized", "naive-quantized") and bits == 8 and kind == "float":
            blocks = {str(w.get("block_structure")): w.get("block_structure") for w in weights}
            if strategy != "block" or len(blocks) == 1:
                return "fp8", *fp8.recognise(
                    raw, _block(next(iter(blocks.values()))) if strategy == "block" else None
                )
    raise SourceError(
        f"compressed-tensors format {form!r} with weights {sorted(map(str, kinds))} is not "
        "supported "
        f"(known: {KNOWN}; symmetric, one kind of weights); use the bf16 checkpoint"
    )


def _block(size: object) -> tuple[int, int] | None:
    if size is None:
        return None
    if (
        isinstance(size, list | tuple)
        and len(size) == 2
        and all(isinstance(n, int) and n > 0 for n in size)
    ):
        return size[0], size[1]
    raise SourceError(f"fp8 block size {size!r} is not supported, expected two positive integers")
