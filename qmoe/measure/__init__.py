"""Quality, size and speed: perplexity and KL, sweeps, benchmarks of codec and kernels.

score        `evaluate`: any checkpoint on a text
perplexity   perplexity and KL of loaded models
sweep        stored bits against quality
points       measured points, remembered
plot         the picture of a sweep
codec_bench  size beside the ideal, speed beside memory bandwidth
dictionary   what QMoE's dictionary code would take
kernels/     timing and static counts of the kernels
"""
