"""From a config's ``quantization_config`` to the virtual dense tensors of a checkpoint."""

from typing import Any

import torch

from qmoe.errors import SourceError
from qmoe.source.formats import awq, fp4, fp8, int4, mxfp4
from qmoe.source.formats.settings import method_of, refuse_changed_basis
from qmoe.source.formats.virtual import Raw, Virtual

KNOWN = (
    "fp8, fbgemm_fp8, mxfp8, mxfp4, gptq, awq (gemm), modelopt (FP8, NVFP4), compressed-tensors "
    "(pack-, int-, float-, naive-quantized, nvfp4-pack-, mxfp4-pack-, mxfp8-quantized)"
)
Found = tuple[dict[str, Virtual], set[str]]
# of the activations and of the key-value cache: nothing to do with weights
ACTIVATION = (
    *("input_scale", "activation_scale", "qscale_act", "input_scale_inv", "input_global_scale"),
    *("input_zero_point", "output_scale", "k_scale", "v_scale"),
)
OF_STACKS = tuple(f"_{n}" for n in ACTIVATION[:5])  # "experts.gate_up_proj_input_scale"
# last parts of names that only quantized tensors have: none may be left over
COMPANIONS = (
    *("weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_shape"),
    *("weight_global_scale", "weight_zero_point", "weight_g_idx", "weight_bitmask", "qweight"),
    *("qzeros", "g_idx", "pre_quant_scale", "absmax", "quant_map", "quant_state", "SCB"),
)


def recognise(raw: Raw, settings: dict[str, Any]) -> tuple[str, dict[str, Virtual], set[str]]:
    """Virtual dense tensors of a quantized checkpoint.

    Args:
        raw: stored tensors.
        settings: the config's ``quantization_config``.

    Returns:
        (format name, virtual tensors by dense name, names that they hide).

    Raises:
        SourceError: the method or one of its settings is not supported, or a tensor belongs to
            none that is quantized; all are named.
    """
    method = method_of(settings)
    if method == "qmoe":
        raise SourceError(
            "this checkpoint is already compressed by qmoe; give the original, or `qmoe export` "
            "it first"
        )
    if method not in METHODS:
        raise SourceError(
            f"quantization method {method!r} of the source is not supported (known: {KNOWN}); use "
            "the bf16 checkpoint"
        )
    refuse_changed_basis(settings)
    name, dense, hidden = METHODS[method](raw, settings)
    for left in raw.names():
        last = left.rpartition(".")[2]
        if last in ACTIVATION or last.endswith(OF_STACKS):
            hidden.add(left)
        elif left not in hidden and left not in dense and last.endswith(COMPANIONS):
            raise SourceError(
                f"tensor {left!r} belongs to a quantized one, but {method} as config.json "
                "describes it has none for it; the settings or the files are of another checkpoint"
            )
    return name, dense, hidden


def _fp8(raw: Raw, settings: dict[str, Any]) -> tuple[str, dict[str, Virtual], set[str]]:
    default = [1, 32] if settings.get("quant_method") == "mxfp8" else fp8.DEFAULT_BLOCK
    block = _block(settings.get("weight_block_size", default))
    dense, hidden = fp8.recognise(raw, block, "weight_block_size" in settings)
    kind = settings.get("expert_dtype", "fp8")
    if kind not in ("fp8", "fp4"):
        raise SourceError(f"fp8 with expert_dtype={kind!r} is not supported (known: fp8, fp4)")
    if kind == "fp4":
        for name, tensor in dense.items():
            if raw.dtype(name) in fp4.BYTES:
                dense[name] = fp4.Fp4(name, tensor.parts[1])
    return "fp8", dense, hidden


def _mxfp4(raw: Raw, settings: dict[str, Any]) -> tuple[str, dict[str, Virtual], set[str]]:
    return "mxfp4", *mxfp4.recognise(raw)


def _gptq(raw: Raw, settings: dict[str, Any]) -> tuple[str, dict[str, Virtual], set[str]]:
    bits, group = settings.get("bits"), settings.get("group_size", -1)
    version = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if settings.get("is_marlin_format"):
        version = "marlin"
    if (
        bits not in int4.WIDTHS
        or not isinstance(group, int)
        or group == 0
        or version not in ("gptq", "gptq_v2")
    ):
        raise SourceError(
            f"GPTQ with bits={bits!r}, group_size={group!r}, checkpoint_format={version!r} is not "
            f"supported (bits {int4.WIDTHS}, formats gptq and gptq_v2); use the bf16 checkpoint"
        )
    dynamic = settings.get("dynamic")
    for pattern, change in dynamic.items() if isinstance(dynamic, dict) else ():
        if isinstance(change, dict) and set(change) & {"bits", "group_size", "pack_dtype"}:
            raise SourceError(
                f"GPTQ with other settings for {pattern!r} ({change}) is not supported; use the "
                "bf16 checkpoint"
            )
    return f"gptq int{bits}", *int4.recognise_gptq(raw, bits, group, int(version == "gptq"))


def _awq(raw: Raw, settings: dict[str, Any]) -> tuple[str, dict[str, Virtual], set[str]]:
    bits, group = settings.get("bits", 4), settings.get("group_size", 128)
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if settings.get("backend") == "llm-awq":
        version = "llm-awq"
    if (
        bits != awq.BITS
        or not isinstance(group, int)
        or group == 0
        or version != "gemm"
        or not settings.get("zero_point", True)
    ):
        raise SourceError(
            f"AWQ with bits={bits!r}, group_size={group!r}, version={version!r}, zero_point="
            f"{settings.get('zero_point', True)!r} is not supported (4 bits with zero points, "
            "version gemm); use the bf16 checkpoint"
        )
    return "awq int4", *awq.recognise(raw, group)


def _modelopt(raw: Raw, settings: dict[str, Any]) -> tuple[str, dict[str, Virtual], set[str]]:
    algorithm = settings.get("quant_algo")
    layers = settings.get("quantized_layers")
    kinds = {algorithm}
    if algorithm == "MIXED_PRECISION" and isinstance(layers, dict):
        kinds = {c.get("quant_algo") for c in layers.values() if isinstance(c, dict)}
    if not kinds or not kinds <= {"FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4"}:
        raise SourceError(
            f"ModelOpt's quant_algo={algorithm!r} "
            f"({', '.join(sorted(map(str, kinds)))}) is not supported (known: FP8, "
            "FP8_PER_CHANNEL_PER_TOKEN, NVFP4); use the bf16 checkpoint"
        )
    size = settings.get("group_size", 16)
    if "NVFP4" in kinds and size not in (16, None):
        raise SourceError(f"NVFP4 with group_size={size!r} is not supported (known: 16)")
    small, scales = fp4.recognise_modelopt(raw)
    rest, more = fp8.recognise(raw, None)
    rest = {n: t for n, t in rest.items() if n not in small}
    return "nvfp4" if small else "fp8", rest | small, scales | more


def _compressed_tensors(
    raw: Raw, settings: dict[str, Any]
) -> tuple[str, dict[str, Virtual], set[str]]:
    groups = settings.get("config_groups")
    groups = [g for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    kinds = {_kind(g, settings.get("format")) for g in groups}
    if not kinds:
        raise SourceError(
            f"compressed-tensors format {settings.get('format')!r} without config_groups is not "
            f"supported (known: {KNOWN}); use the bf16 checkpoint"
        )
    for reader in {k[0] for k in kinds}:
        if len({k for k in kinds if k[0] == reader}) > 1:
            raise SourceError(
                f"compressed-tensors with several kinds of {reader} weights is not supported; use "
                "the bf16 checkpoint"
            )
    dense: dict[str, Virtual] = {}
    hidden: set[str] = set()
    names = []
    for reader, value in sorted(kinds, key=str):
        if reader == "packed":
            found, name = int4.recognise_packed(raw, value), f"int{value}"
        elif reader == "fp4":
            found, name = fp4.recognise_packed(raw), value
        else:
            block = value if isinstance(value, tuple) else None
            name = "int8" if value == "int8" else "fp8"
            types = (torch.int8,) if value == "int8" else fp8.FP8
            found = fp8.recognise(raw, block, kinds=types)
        dense |= {n: t for n, t in found[0].items() if n not in dense}
        hidden |= found[1]
        names.append(name)
    return ", ".join(names), dense, hidden


def _kind(group: dict[str, Any], form: Any) -> tuple[str, Any]:
    """(which code reads a group's weights, what it must be told)."""
    form = group.get("format") or form
    w = group.get("weights")
    w = w if isinstance(w, dict) else {}
    bits, kind, size = w.get("num_bits"), w.get("type", "int"), w.get("group_size")
    # where it is not stated, compressed-tensors takes it from the size of the groups
    strategy = w.get("strategy") or {None: "tensor", -1: "channel"}.get(size, "group")
    match (form, bits, kind, strategy if w.get("symmetric", True) else "asymmetric"):
        case ("pack-quantized", 2 | 4 | 8, "int", "group" | "channel"):
            return "packed", bits
        case ("nvfp4-pack-quantized", 4, "float", "tensor_group" | "group") if size == 16:
            return "fp4", "nvfp4"
        case ("mxfp4-pack-quantized", 4, "float", "group") if size == 32:
            return "fp4", "mxfp4"
        case ("mxfp8-quantized", 8, "float", "group") if size == 32:
            return "bytes", (1, 32)
        case ("float-quantized" | "naive-quantized", 8, "float", "block"):
            return "bytes", _block(w.get("block_structure"))
        case ("float-quantized" | "naive-quantized", 8, "float", "tensor" | "channel"):
            return "bytes", "float8"
        case ("int-quantized" | "naive-quantized", 8, "int", "tensor" | "channel"):
            return "bytes", "int8"
    stated = {k: w.get(k) for k in ("num_bits", "type", "symmetric", "strategy", "group_size")}
    raise SourceError(
        f"compressed-tensors format {form!r} with weights {stated} is not supported (known: "
        f"{KNOWN}; symmetric); use the bf16 checkpoint"
    )


METHODS = {
    "fp8": _fp8,
    "mxfp8": _fp8,
    "fbgemm_fp8": lambda raw, settings: ("fp8", *fp8.recognise(raw, None)),
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "awq": _awq,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "compressed-tensors": _compressed_tensors,
    "compressed_tensors": _compressed_tensors,
}


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
