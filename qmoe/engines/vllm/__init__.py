"""vLLM's plug-in: ``vllm serve OUT`` and ``LLM(OUT)`` for what `qmoe compress` wrote.

vLLM calls `register` (entry point group ``vllm.general_plugins``) in every one of its processes:
front end, engine core, workers. It swallows an exception raised there and would later say that the
quantization method is unknown, so `register` does as little as it can.

config   which checkpoint, opened and verified once
loader   everything but the experts, under the names of the published checkpoint
experts  a layer's experts, as vLLM's quantization method for routed experts
mends    what vLLM computes otherwise than the model, put right
ranks    which experts a rank keeps

Read from, and tested with, vLLM 0.32.
"""

TESTED = (0, 32)
_done = False


def register() -> None:
    """Makes quantization method and load format "qmoe" known to vLLM; may be called again."""
    global _done
    if _done:
        return
    _done = True
    _answer_like_a_module()
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.model_loader import register_model_loader

    from qmoe.engines.vllm.config import QmoeConfig
    from qmoe.engines.vllm.loader import QmoeLoader, choose_loader

    register_quantization_config("qmoe")(QmoeConfig)
    register_model_loader("qmoe")(QmoeLoader)
    choose_loader()


def _answer_like_a_module() -> None:
    """Keeps llvmlite's library object from claiming a ``__dict__`` that it does not have.

    vLLM 0.32 on a CPU without triton-cpu reads ``vars(v)`` of every attribute of every module
    (`vllm.triton_utils.dispatcher`); llvmlite, which numba brings, answers any name with a foreign
    function, ``__dict__`` included, and vLLM ends with "'_lib_fn_wrapper' object has no attribute
    'get'".
    """
    try:
        from llvmlite.binding.ffi import _lib_wrapper
    except ImportError:
        return
    plain = _lib_wrapper.__getattr__

    def without_dunders(self: object, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return plain(self, name)

    _lib_wrapper.__getattr__ = without_dunders
