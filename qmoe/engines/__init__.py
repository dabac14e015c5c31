"""Other people's programs as runners of compressed checkpoints.

vllm/     the plug-in through which vLLM reads and runs them
serve     an OpenAI server: transformers' own, or vLLM's
gate      what stands before transformers' server
chat      a conversation in the terminal
run       any script or console command, with the format registered
commands  the command lines of these
"""
