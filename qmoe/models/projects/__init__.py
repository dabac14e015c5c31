"""Small model classes for training projects that transformers does not cover.

Each is a transformers model with experts under ``@use_experts_implementation``, so that everything
else in this package treats it like any other. Source files: `qmoe.models.importers`.
"""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from qmoe.models.projects.fairseq_moe import FairseqMoeConfig, FairseqMoeForCausalLM
from qmoe.models.projects.megatron_moe import MegatronMoeConfig, MegatronMoeForCausalLM
from qmoe.models.projects.openmoe import OpenMoeConfig, OpenMoeForCausalLM

MODELS: dict[Any, Any] = {
    OpenMoeConfig: OpenMoeForCausalLM,
    FairseqMoeConfig: FairseqMoeForCausalLM,
    MegatronMoeConfig: MegatronMoeForCausalLM,
}


def register() -> None:
    """Make the model types known to transformers' Auto classes; may be called again."""
    for config, model in MODELS.items():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
