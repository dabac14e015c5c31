"""Encoded dense matrices on the way into a model that transformers loads: decoded once, into the
ordinary parameters, or on a CPU kept as integers where that is all they are.

The two tensors of a matrix go through a weight converter of transformers (private API, read from
5.23; tests/test_dense_bits.py covers what is relied on), so that dtype, device and offloading are
decided as for every other parameter.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from qmoe.codec import Integers
from qmoe.errors import CorruptError
from qmoe.inference.linear import IntegerLinear, fits
from qmoe.models.ties import tied_names
from qmoe.store.reader import Container
from qmoe.store.stored_dense import OFFSETS, STREAM, StoredMatrix


class Decode(ConversionOps):
    """(stream, offsets) -> the decoded parameter. One way only: saving writes the encoded form.

    Attributes:
        dtype: of the parameter; set by the quantizer, which is asked for it before every load.
        failures: what could not be decoded. transformers would turn an exception raised here into
            its own, so errors wait until the load is over.
    """

    def __init__(
        self,
        container: Container,
        failures: list[CorruptError],
        kept: dict[str, Integers | None],
    ) -> None:
        self.container, self.failures, self.kept = container, failures, kept
        self.dtype = torch.float32

    def __deepcopy__(self, memo: Any) -> "Decode":
        """transformers copies a converter for every parameter; the container is not copied."""
        return Decode(self.container, self.failures, self.kept)

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
            if full_layer_name in self.kept:
                self.kept[full_layer_name] = integers = coded.integers()
                weight = integers.codes
            else:
                weight = coded.decode(self.dtype)
        except CorruptError as e:
            self.failures.append(e)
            weight = torch.zeros(geometry.rows, geometry.cols, dtype=self.dtype)
        return {full_layer_name: weight.to(stream.device)}


def keep_integers(model: nn.Module, container: Container) -> dict[str, Integers | None]:
    """Puts an `IntegerLinear` where an encoded dense matrix can stay integers, on the current
    default device.

    Returns:
        Their parameters' names; `Decode` fills in the matrices.
    """
    tied = tied_names(model)
    shared = {name for pair in tied for name in pair}
    kept: dict[str, Integers | None] = {}
    for name, g in container.dense.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf == "weight" and name not in shared and fits(module, g.rows, g.cols, g.planes):
            model.set_submodule(path, IntegerLinear(cast(nn.Linear, module), g.band))
            kept[name] = None
    return kept


def give_scales(model: nn.Module, kept: dict[str, Integers | None]) -> None:
    """After loading: the scales that belong to the integers."""
    for name, integers in kept.items():
        module = model.get_submodule(name.rpartition(".")[0])
        if integers is not None:
            module.row_index, module.col_index = integers.row_index, integers.col_index
    kept.clear()


def converters(
    container: Container, failures: list[CorruptError], kept: dict[str, Integers | None]
) -> list[WeightConverter]:
    """What transformers needs to load the encoded dense matrices of a container."""
    leaves = {name.rpartition(".")[2] for name in container.dense}
    return [
        WeightConverter(
            [rf"{leaf}.{STREAM}", rf"{leaf}.{OFFSETS}"], leaf, [Decode(container, failures, kept)]
        )
        for leaf in sorted(leaves)
    ]
