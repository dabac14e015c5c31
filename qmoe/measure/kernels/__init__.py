"""Benchmarks and static counts of the kernels."""
