"""Encoded dense matrices on the way into a model that transformers loads: decoded once, into the
ordinary parameters.

The two tensors of a matrix go through a weight converter of transformers (private API, read from
5.23; tests/test_dense_bits.py covers what is relied on), so that dtype, device and offloading are
decided as for every other parameter.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from qmoe.errors import CorruptError
from qmoe.store.reader import Container
from qmoe.store.stored_dense import OFFSETS, STREAM, StoredMatrix


class Decode(ConversionOps):
    """(stream, offsets) -> the decoded parameter. One way only: saving writes the encoded form.

    Attributes:
        dtype: of the parameter; set by the quantizer, which is asked for it before every load.
        failures: what could not be decoded. transformers would turn an exception raised here into
            its own, so errors wait until the load is over.
    """

    def __init__(self, container: Container, failures: list[CorruptError]) -> None:
        self.container, self.failures = container, failures
        self.dtype = torch.float32

    def __deepcopy__(self, memo: Any) -> "Decode":
        """transformers copies a converter for every parameter; the container is not copied."""
        return Decode(self.container, self.failures)

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        **_: Any,
    ) -> dict[str, Tensor]:
        """One parameter, by its full name, on the device on which the stream arrived."""
        stream, offsets = (input_dict[p][0] for p in source_patterns)
        geometry = self.container.dense[full_layer_name]
        try:
            coded = StoredMatrix(geometry, stream.cpu(), offsets.cpu())
            weight = coded.decode(self.dtype)
        except CorruptError as e:
            self.failures.append(e)
            weight = torch.zeros(geometry.rows, geometry.cols, dtype=self.dtype)
        return {full_layer_name: weight.to(stream.device)}


def converters(container: Container, failures: list[CorruptError]) -> list[WeightConverter]:
    """What transformers needs to load the encoded dense matrices of a container."""
    leaves = {name.rpartition(".")[2] for name in container.dense}
    return [
        WeightConverter(
            [rf"{leaf}.{STREAM}", rf"{leaf}.{OFFSETS}"], leaf, [Decode(container, failures)]
        )
        for leaf in sorted(leaves)
    ]
