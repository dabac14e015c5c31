"""llama.cpp beside qmoe: a Qwen3-MoE checkpoint as GGUF files, and forwards of them, by ctypes.

Neither the library nor `gguf` is a dependency. The library comes with the npm package
`@node-llama-cpp/linux-x64` (the folder that holds libllama.*.so and the CPU backends) or is built;
structs are those of llama.cpp v0.5.0, and another version is refused.
"""

import ctypes as c
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

FTYPES = {"IQ1_S": 24, "IQ2_XXS": 19, "Q4_K": 14}
_STRUCT = 1024  # bytes that are passed for a struct by value; the callee reads what it knows
_KV_UNIFIED = 133  # offset in llama_context_params
VERSION = "0.5.0"


class _Params(c.Structure):
    _fields_ = [("raw", c.c_uint8 * _STRUCT)]

    def put(self, offset: int, kind: Any, value: Any) -> None:
        kind.from_buffer(self, offset).value = value


class _Batch(c.Structure):
    _fields_ = [
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.c_void_p),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    ]


class _Importance(c.Structure):
    _fields_ = [("name", c.c_char_p), ("data", c.POINTER(c.c_float)), ("size", c.c_size_t)]


_LOG = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
_QUIET = _LOG(lambda level, text, data: None)


class Library:
    """The loaded library."""

    def __init__(self, folder: Path) -> None:
        base = sorted(folder.glob("libggml-base*.so*"))
        ggml = sorted(folder.glob("libggml.*so*"))
        llama = [p for p in sorted(folder.glob("libllama.*so*")) if "common" not in p.name]
        if not (base and ggml and llama):
            raise SystemExit(f"{folder} holds no libllama, libggml and libggml-base")
        c.CDLL(str(base[0]), mode=c.RTLD_GLOBAL)
        self.ggml = c.CDLL(str(ggml[0]), mode=c.RTLD_GLOBAL)
        self.lib = lib = c.CDLL(str(llama[0]), mode=c.RTLD_GLOBAL)
        lib.llama_version.restype = c.c_char_p
        found = lib.llama_version().decode()
        if VERSION not in found:
            raise SystemExit(f"{llama[0]} is llama.cpp {found}; this script knows {VERSION}")
        lib.llama_log_set(_QUIET, None)
        self.ggml.ggml_backend_load_all_from_path(str(folder).encode())
        lib.llama_backend_init()
        for name in ("model", "context", "model_quantize"):
            getattr(lib, f"llama_{name}_default_params").restype = _Params
        for name in ("model_load_from_file", "init_from_model", "get_memory"):
            getattr(lib, f"llama_{name}").restype = c.c_void_p
        lib.llama_get_logits_ith.restype = c.POINTER(c.c_float)

    def quantize(self, source: Path, out: Path, kind: str, names: dict[str, int]) -> None:
        """Quantizes a GGUF file on one thread, every input counting alike.

        Args:
            source: bf16.
            out: written.
            kind: of FTYPES.
            names: inputs of each matrix that is quantized (times experts).
        """
        params = self.lib.llama_model_quantize_default_params()
        params.put(0, c.c_int32, 1)
        params.put(4, c.c_int32, FTYPES[kind])
        ones = {n: (c.c_float * size)(*([1.0] * size)) for n, size in names.items()}
        entries = [_Importance(n.encode(), ones[n], names[n]) for n in names]
        array = (_Importance * (len(entries) + 1))(*entries, _Importance(None, None, 0))
        params.put(24, c.c_void_p, c.addressof(array))
        if self.lib.llama_model_quantize(str(source).encode(), str(out).encode(), c.byref(params)):
            raise SystemExit(f"llama.cpp does not quantize {source} to {kind}")


class Model:
    """A GGUF file in memory, with a context of its own."""

    def __init__(self, library: Library, path: Path, threads: int, most: int) -> None:
        """Args: most: tokens of a forward."""
        self.lib = library.lib
        params = self.lib.llama_model_default_params()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {path}")
        self.model = c.c_void_p(self.model)
        context = self.lib.llama_context_default_params()
        for offset, value in ((0, 4 * most), (4, most), (8, most), (12, 64)):
            context.put(offset, c.c_uint32, value)
        for offset in (28, 32):
            context.put(offset, c.c_int32, threads)
        context.put(_KV_UNIFIED, c.c_bool, True)  # else every sequence has a 64th of the cells
        self.context = c.c_void_p(self.lib.llama_init_from_model(self.model, context))
        self.vocab = self.lib.llama_vocab_n_tokens(
            c.c_void_p(self._pointer("llama_model_get_vocab", self.model))
        )

    def _pointer(self, name: str, *arguments: Any) -> Any:
        function = getattr(self.lib, name)
        function.restype = c.c_void_p
        return function(*arguments)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [n, vocab] of the last token of each row of ids [n, length]."""
        n, length = ids.shape
        total = n * length
        memory = c.c_void_p(self.lib.llama_get_memory(self.context))
        self.lib.llama_memory_clear(memory, False)
        rows = [(c.c_int32 * 1)(i) for i in range(n) for _ in range(length)]
        last = [int(k == length - 1) for _ in range(n) for k in range(length)]
        batch = _Batch(
            total,
            (c.c_int32 * total)(*ids.reshape(-1).tolist()),
            None,
            (c.c_int32 * total)(*(k for _ in range(n) for k in range(length))),
            (c.c_int32 * total)(*([1] * total)),
            (c.POINTER(c.c_int32) * total)(*(c.cast(r, c.POINTER(c.c_int32)) for r in rows)),
            (c.c_int8 * total)(*last),
        )
        if self.lib.llama_decode(self.context, batch):
            raise SystemExit("llama.cpp fails to decode")
        places = [i for i, wanted in enumerate(last) if wanted]
        found = [
            np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, i), (self.vocab,))
            for i in places
        ]
        return torch.from_numpy(np.stack(found))


def write_gguf(source: Path, out: Path) -> dict[str, int]:
    """A Qwen3-MoE checkpoint as bf16 GGUF, without a vocabulary.

    Returns:
        Inputs (times experts) of every matrix, by its name in the file.
    """
    import gguf

    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(out, "qwen3moe")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(32)
    sizes = {}
    for name, tensor in _tensors(source, config):
        data = tensor.float().numpy() if tensor.ndim == 1 or "gate_inp" in name else None
        if data is None:
            raw = tensor.view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
            sizes[name] = tensor.shape[-1] * (tensor.shape[0] if tensor.ndim == 3 else 1)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sizes


_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
}


def _tensors(source: Path, config: dict[str, Any]) -> Any:
    where = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    opened = {f: safe_open(source / f, "pt") for f in set(where.values())}

    def read(name: str) -> torch.Tensor:
        return opened[where[name]].get_tensor(name)

    for name, other in _NAMES.items():
        yield other, read(name)
    for i in range(config["num_hidden_layers"]):
        stem = f"model.layers.{i}."
        for name, other in _LAYER.items():
            yield f"blk.{i}.{other}.weight", read(f"{stem}{name}.weight")
        for part in ("gate", "up", "down"):
            each = [
                read(f"{stem}mlp.experts.{e}.{part}_proj.weight")
                for e in range(config["num_experts"])
            ]
            yield f"blk.{i}.ffn_{part}_exps.weight", torch.stack(each)
