"""The shapes of experts modules.

find          which modules hold experts, and running one expert: the entry point
kind          what every shape has in common
fused         experts under ``@use_experts_implementation``
module_dicts  ModuleDicts of small networks
others        Llama 4, DBRX, JetMoE
aliases       model types that are others under a new name
"""
