"""Benchmarks and static counts of the kernels.

gpu      timing against bf16 on a GPU
static   registers, instructions and cache lines without one
sass     compiling ahead of time, reading machine code
trace    what the lanes of a warp touch
sample   matrices to measure and test with
latency  time of a batch-1 launch by a model of the machine code
packing  how fast experts are laid out for the kernels
"""
