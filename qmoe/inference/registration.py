"""What ``import qmoe`` promises: transformers knows the format and our model classes.

Nothing is registered twice, and nothing before transformers itself is imported, so that ``import
qmoe`` costs next to nothing.
"""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from qmoe.inference.quantizer import QmoeConfig, QmoeQuantizer
from qmoe.models.projects.fairseq_moe import FairseqMoeConfig, FairseqMoeForCausalLM
from qmoe.models.projects.megatron_moe import MegatronMoeConfig, MegatronMoeForCausalLM
from qmoe.models.projects.openmoe import OpenMoeConfig, OpenMoeForCausalLM

MODELS: dict[Any, Any] = {
    OpenMoeConfig: OpenMoeForCausalLM,
    FairseqMoeConfig: FairseqMoeForCausalLM,
    MegatronMoeConfig: MegatronMoeForCausalLM,
}


def register() -> None:
    """Makes the format and our model types known to transformers; may be called again."""
    if "qmoe" not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config("qmoe")(QmoeConfig)
        register_quantizer("qmoe")(QmoeQuantizer)
    for config, model in MODELS.items():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
