"""Quality, size and speed: perplexity and KL, sweeps, benchmarks of codec and kernels."""
