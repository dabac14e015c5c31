"""A model in vLLM, in a process of its own, since parallel workers want a fresh one.

    python run_model.py OUT '{"prompts": [[5, 9]], "tokens": 8, "engine": {...}}'

The last line printed is JSON: the greedy tokens of every prompt, and the bytes of experts that each
rank keeps.
"""

import json
import os
import sys

os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions go to the workers by pickle


def main() -> None:
    import vllm

    from qmoe.engines.vllm.ranks import expert_bytes

    task = json.loads(sys.argv[2])
    settings = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 4, "enforce_eager": True}
    llm = vllm.LLM(sys.argv[1], **(settings | task.get("engine", {})))
    params = vllm.SamplingParams(temperature=0, max_tokens=task["tokens"], ignore_eos=True)
    prompts = [{"prompt_token_ids": p} for p in task["prompts"]]
    found = llm.generate(prompts, params, use_tqdm=False)
    tokens = [list(r.outputs[0].token_ids) for r in found]
    print(json.dumps({"tokens": tokens, "bytes": llm.apply_model(expert_bytes)}), flush=True)


if __name__ == "__main__":  # workers import this file again
    main()
