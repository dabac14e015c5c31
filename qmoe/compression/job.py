"""`Job`: what every part of one compression works with."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qmoe.calib.activations import ActivationStore
from qmoe.compression.settings import Settings
from qmoe.models.streamed import StreamedModel
from qmoe.quantize import Method
from qmoe.system.processes import World

Batches = Sequence[dict[str, Tensor]]


@dataclass(frozen=True)
class Job:
    """What every part of one compression works with. A part that does some of it differently gets
    a copy (`dataclasses.replace`): the probe its own method and a share of the batches.

    Attributes:
        settings: what the user chose.
        streamed: the source's model, one block in memory at a time.
        tokenizer: knows which tokens are special.
        batches: calibration inputs, without labels.
        method: the solver.
        device: where solvers, Hessians and forwards run.
        world: the processes that share the work.
        store: room for activations; none before the plan has said how much there is.
        progress: draw bars.
        own: how many of the batches, the last ones, are the model's own words and not of the text.
    """

    settings: Settings
    streamed: StreamedModel
    tokenizer: Any
    batches: Batches
    method: Method
    device: torch.device
    world: World = field(default_factory=World)
    store: ActivationStore = field(default_factory=lambda: ActivationStore(0))
    progress: bool = False
    own: int = 0

    def tokens(self) -> int:
        """Calibration tokens of one stream of inputs, over all batches."""
        return sum(batch["input_ids"].numel() for batch in self.batches)
