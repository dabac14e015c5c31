"""Models in vLLM, one after another, in a process of its own: parallel workers want a fresh one.

    python run_model.py '[{"model": "OUT", "prompts": [[5, 9]], "tokens": 8, "engine": {...}}, ...]'

A line "RESULT " and JSON for each: the greedy tokens of every prompt, and the bytes of experts that
each rank keeps; or the error that ended it. "forget": part of a tensor's name that is not loaded.
"kernels": experts as on a GPU, by its kernels, executed as PTX (tests/ptx); "launches" names them.
"""

import json
import os
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions go to the workers by pickle
SETTINGS = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 4, "enforce_eager": True}


def run(task):
    import vllm

    from qmoe.engines.vllm.ranks import expert_bytes

    with as_on_a_gpu() if task.get("kernels") else nullcontext() as session:
        llm = vllm.LLM(task["model"], **(SETTINGS | task["engine"]))
        params = vllm.SamplingParams(temperature=0, max_tokens=task["tokens"], ignore_eos=True)
        prompts = [{"prompt_token_ids": p} for p in task["prompts"]]
        answers = llm.generate(prompts, params, use_tqdm=False)
        found = {"bytes": llm.apply_model(expert_bytes)}
        found["tokens"] = [list(r.outputs[0].token_ids) for r in answers]
        if session is not None:
            found["launches"] = [launch.name for launch in session.launches]
        llm.llm_engine.engine_core.shutdown()
    return found


@contextmanager
def as_on_a_gpu():
    """The plug-in's way on a GPU, with tensors on the CPU: packed while vLLM loads, streams
    dropped, every product by the kernels."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from ptx.launch import executed

    import qmoe.engines.vllm as plug

    plug.register()
    from qmoe.engines.vllm import experts
    from qmoe.inference.cuda import run_kernels
    from qmoe.inference.experts import BACKENDS

    gpu = SimpleNamespace(is_cpu=lambda: False, device_type="cpu")
    with (
        mock.patch.object(experts, "current_platform", gpu),
        mock.patch.dict(BACKENDS, {"cpu": run_kernels}),
        executed(90) as session,
    ):
        yield session


def forgetting(part):
    """As if a tensor were missing."""
    import qmoe.engines.vllm as plug

    plug.register()
    from qmoe.engines.vllm.loader import QmoeLoader

    plain = QmoeLoader.get_all_weights

    def get_all_weights(*arguments):
        return (pair for pair in plain(*arguments) if part is None or part not in pair[0])

    QmoeLoader.get_all_weights = get_all_weights
    return lambda: setattr(QmoeLoader, "get_all_weights", plain)


def main():
    for task in json.loads(sys.argv[1]):
        remember = forgetting(task.get("forget"))
        try:
            found = run(task)
        except Exception as e:
            found = {"error": f"{type(e).__name__}: {e}"}
        remember()
        print("\nRESULT " + json.dumps(found), flush=True)  # vLLM's processes print as well


if __name__ == "__main__":  # workers import this file again
    main()
