"""Small model classes for training projects that transformers does not cover.

Each is a transformers model with experts under ``@use_experts_implementation``, so that everything
else in this package treats it like any other. Source files: `qmoe.models.importers`.

openmoe, fairseq_moe, megatron_moe  one project each
sparse                              what they share
"""

import transformers  # noqa: F401  # first, so that registration never meets a half-imported module
