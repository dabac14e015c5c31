"""The run path: encoded experts in the place of a model's own, on a CPU or through the kernels."""
