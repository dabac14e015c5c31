"""The run path: encoded experts in the place of a model's own, on a CPU or through the kernels.

load          `load`: a compressed checkpoint as a transformers model
registration  what ``import qmoe`` teaches transformers
quantizer     the quantization method "qmoe" of transformers
structure     the model that config.json describes, against what is stored
experts       the module that stands where a model's experts stood
on_cpu        the backend that needs nothing
combine       the sum of what a token's experts say
cache         decoded things, least recently used first out
operator      experts on the CPU as a custom operator
cuda          experts through the kernels
dense         encoded dense matrices, decoded once
save          ``model.save_pretrained``
adapters      peft beside encoded experts
linear        Linears whose weights stay 8-bit integers
"""

import transformers  # noqa: F401  # first, so that registration never meets a half-imported module
