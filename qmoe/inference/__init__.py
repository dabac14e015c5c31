"""The run path: encoded experts in the place of a model's own, on a CPU or through the kernels."""

import transformers  # noqa: F401  # first, so that registration never meets a half-imported module
