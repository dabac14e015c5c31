"""Benchmarks and static counts of the kernels.

gpu     timing against bf16 on a GPU
static  registers, instructions and cache lines without one
sass    compiling ahead of time, reading machine code
trace   what the lanes of a warp touch
sample  matrices to measure and test with
"""
