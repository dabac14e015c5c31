"""Peers of scripts/compare: each turns a small checkpoint into a plain one whose weights are what
the peer's format would restore, and says what the format stores.

    llama.cpp   its own library by ctypes (libggml-base, libllama); importance matrix as llama.cpp
                makes it: mean squared input of every matrix over the calibration tokens, ones for
                an expert without tokens. Single types on the experts, and whole mixed files: which
                tensor gets which type is what llama_model_quantize itself decides.
    HQQ         the package `hqq`, on the experts: groups of 64 along the rows, scale and zero point
                of 16 bits each.
"""

import ctypes
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

EXPERT = re.compile(
    r"layers\.(\d+)\..*experts\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight$"
)
FTYPES = {"q2_k": 10, "q3_k_m": 12, "q4_k_m": 15}  # whole files: numbers of enum llama_ftype
HQQ_GROUP = 64
Weights = dict[str, Tensor]
Importance = dict[str, np.ndarray]


@torch.no_grad()
def importance_matrix(source: Path, ids: Tensor) -> Importance:
    """{name of a weight on the disk: mean squared input, float32 [cols]} over the tokens `ids`."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2)
        sums[name] = sums.get(name, 0) + x.square().sum(0)
        counts[name] = counts.get(name, 0) + len(x)

    def watch(layer: int, experts: torch.nn.Module) -> Callable:
        def hook(_: object, args: tuple[Tensor, ...]) -> None:
            x, index = args[:2]
            for e in range(experts.num_experts):
                rows = x[(index == e).any(-1)]
                gate, up = F.linear(rows, experts.gate_up_proj[e]).chunk(2, -1)
                add(f"{layer} {e} in", rows)
                add(f"{layer} {e} down", experts.act_fn(gate) * up)

        return hook

    for i, block in enumerate(model.model.layers):
        block.mlp.experts.register_forward_pre_hook(watch(i, block.mlp.experts))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, a, n=name: add(f"{n}.weight", a[0]))
    for batch in ids.split(16):
        model(input_ids=batch)
    means = {k: s / counts[k] if counts[k] else torch.ones_like(s) for k, s in sums.items()}
    return {k: np.ascontiguousarray(v.numpy(), np.float32) for k, v in means.items()}


def of_weight(importance: Importance, name: str, cols: int) -> np.ndarray:
    """The row of the importance matrix for a weight; ones for tables that are looked up."""
    found = EXPERT.search(name)
    if found:
        place = "down" if found[3] in ("w2", "down_proj") else "in"
        return importance[f"{found[1]} {found[2]} {place}"]
    return importance.get(name, np.ones(cols, np.float32))


class Ggml:
    """The functions of llama.cpp's libraries that quantize."""

    def __init__(self, folder: Path) -> None:
        """Args: folder: where libggml-base and libllama are."""
        self.folder = folder
        self.lib = lib = ctypes.CDLL(str(next(folder.glob("libggml-base*.so*"))))
        lib.ggml_quantize_chunk.restype = lib.ggml_row_size.restype = ctypes.c_size_t
        sizes = [ctypes.c_int64] * 3
        pointers = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
        lib.ggml_quantize_chunk.argtypes = [*pointers, *sizes, ctypes.c_void_p]
        lib.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
        lib.ggml_blck_size.restype = ctypes.c_int64
        lib.ggml_type_name.restype = ctypes.c_char_p
        names = {t: lib.ggml_type_name(t) for t in range(43)}
        self.types = {n.decode().lower(): t for t, n in names.items() if n}

    def round_trip(self, kind: str, w: Tensor, importance: np.ndarray) -> tuple[Tensor, int]:
        """What a type restores of a matrix, and its bytes.

        Raises:
            ValueError: a row does not fill a block of the type.
        """
        t, (rows, cols) = self.types[kind], w.shape
        if cols % self.lib.ggml_blck_size(t):
            raise ValueError(f"rows of {cols} weights do not fill a block of {kind}")
        self.lib.ggml_quantize_init(t)
        plain = np.ascontiguousarray(w.float().numpy())
        size = self.lib.ggml_row_size(t, cols) * rows
        stored, back = np.zeros(size, np.uint8), np.zeros_like(plain)
        given = self.lib.ggml_quantize_chunk(
            t, plain.ctypes.data, stored.ctypes.data, 0, rows, cols, importance.ctypes.data
        )
        if given != size:
            raise ValueError(f"{kind} wrote {given} bytes, expected {size}")
        restore = getattr(self.lib, "dequantize_row_" + re.sub("_k$", "_K", kind))
        restore.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        restore.restype = None
        for i in range(rows):
            restore(stored.ctypes.data + i * (size // rows), back.ctypes.data + i * cols * 4, cols)
        return torch.from_numpy(back), size

    def types_of_file(self, gguf_in: Path, out: Path, ftype: int) -> None:
        """Lets llama.cpp write a mixed file: `out` then holds every tensor in the type it chose."""

        class Params(ctypes.Structure):
            """The fields in front that are used, and room for those behind them."""

            _fields_ = (
                ("threads", ctypes.c_int32),
                ("ftype", ctypes.c_int32),
                ("others", ctypes.c_ubyte * 184),
            )

        for name in ("libggml-base", "libggml", "libllama"):
            found = sorted(p for p in self.folder.glob(f"{name}.*so*") if "cpu" not in p.name)
            lib = ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)
        quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self._quiet = quiet(lambda level, text, data: None)  # kept alive with the library
        lib.llama_log_set(self._quiet, None)
        lib.llama_model_quantize_default_params.restype = Params
        params = lib.llama_model_quantize_default_params()
        params.threads, params.ftype = 1, ftype
        lib.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p]
        lib.llama_model_quantize.restype = ctypes.c_uint32
        code = lib.llama_model_quantize(
            str(gguf_in).encode(), str(out).encode(), ctypes.addressof(params)
        )
        if code:
            raise ValueError(f"llama_model_quantize gave {code} for {gguf_in}")


def find_llama(given: Path | None) -> Path | None:
    """The folder of llama.cpp's libraries: the one given, or that of the npm package
    `@node-llama-cpp/linux-x64` below the current directory."""
    places = [given] if given else [Path("node_modules")]
    for place in places:
        if place.is_dir() and (found := sorted(place.rglob("libggml-base*.so*"))):
            return found[0].parent
    return None


def experts_only(weights: Weights, restore: Callable[[str, Tensor], tuple[Tensor, float]]) -> float:
    """Replaces every expert's matrices by what `restore` gives; returns stored bits per weight."""
    bits = count = 0.0
    for name in [n for n in weights if EXPERT.search(n)]:
        weights[name], stored = restore(name, weights[name])
        bits += stored
        count += weights[name].numel()
    if not count:
        raise ValueError("no experts found under the names of Mixtral and Qwen3-MoE")
    return bits / count


def hqq_restore(bits: int) -> Callable[[str, Tensor], tuple[Tensor, float]]:
    """HQQ of one matrix. Raises ImportError where the package is missing."""
    from hqq.core.quantize import Quantizer

    def restore(name: str, w: Tensor) -> tuple[Tensor, float]:
        options = {"nbits": bits, "group_size": HQQ_GROUP, "axis": 1, "bitpack": False}
        q, meta = Quantizer.quantize(
            w.float(), **options, device="cpu", compute_dtype=torch.float32
        )
        back = Quantizer.dequantize(q, meta).float().view_as(w)
        return back, w.numel() * (bits + 32 / HQQ_GROUP)

    return restore


@contextmanager
def plain_copy(source: Path, to: Path) -> Iterator[Weights]:
    """A float32 copy of a checkpoint in one file; what the body does to the weights is saved."""
    weights = load_file(source / "model.safetensors")
    yield weights
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    for file in source.glob("*.json"):
        shutil.copyfile(file, to / file.name)
    config = json.loads((to / "config.json").read_text()) | {"dtype": "float32"}
    (to / "config.json").write_text(json.dumps(config, indent=1))
    plain = {k: v.float().contiguous() for k, v in weights.items()}
    save_file(plain, to / "model.safetensors", metadata={"format": "pt"})
