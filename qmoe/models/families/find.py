"""Which modules of a model hold experts, and how to run one expert. The one entry point to
`qmoe.models.families`.

Knows nothing about files, quantization or codecs.
"""

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from qmoe.errors import UnsupportedModelError
from qmoe.models.families.fused import FUSED
from qmoe.models.families.kind import Kind, Record, Routed
from qmoe.models.families.module_dicts import NLLB, SWITCH
from qmoe.models.families.others import DBRX, LINEAR, LLAMA4
from qmoe.types import ExpertsLayout

_ROW_BYTES = 16
KINDS: dict[str, Kind] = {k.name: k for k in (FUSED, SWITCH, NLLB, LLAMA4, DBRX, LINEAR)}


class NoExpertsError(UnsupportedModelError):
    """A model without experts, or with such as this release does not know."""


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a dense experts module, None for any other module."""
    return next((k for k in KINDS.values() if k.matches(module)), None)


def layout_of(path: str, module: nn.Module) -> ExpertsLayout:
    """Geometry of one experts module (which may be on the meta device).

    Raises:
        UnsupportedModelError: the module is of no known kind.
    """
    kind = kind_of(module)
    if kind is None:
        raise UnsupportedModelError(
            f"{path}: {type(module).__name__} is not a known experts module"
        )
    return ExpertsLayout(path, kind.name, kind.experts(module), kind.projections(module))


def find_experts(model: nn.Module) -> list[tuple[ExpertsLayout, nn.Module]]:
    """All experts modules of a model in definition order.

    Raises:
        NoExpertsError: the model has none.
        UnsupportedModelError: modules for experts with none, or with empty ones.
    """
    found = experts_in(model)
    require(model, found)
    return found


def experts_in(model: nn.Module) -> list[tuple[ExpertsLayout, nn.Module]]:
    """As `find_experts`; of a model without experts, none."""
    found = [(layout_of(path, m), m) for path, m in model.named_modules() if kind_of(m) is not None]
    for layout, module in found:
        if layout.experts < 1 or not layout.weights:
            raise UnsupportedModelError(
                f"{layout.path}: {type(module).__name__} with {layout.experts} experts of "
                f"{[(p.rows, p.cols) for p in layout.projections]}; is config.json right?"
            )
    return found


def require(model: nn.Module, found: list[tuple[ExpertsLayout, nn.Module]]) -> None:
    """Raises `NoExpertsError` if none are found."""
    if not found:
        raise NoExpertsError(
            f"{type(model).__name__} has no mixture-of-experts module that this release knows; "
            f"known kinds: {', '.join(KINDS)}"
        )


def _known(module: nn.Module) -> Kind:
    kind = kind_of(module)
    if kind is None:
        raise UnsupportedModelError(f"{type(module).__name__} is not a known experts module")
    return kind


def read_expert(module: nn.Module, expert: int) -> dict[str, Tensor]:
    """{projection: canonical matrix [rows, cols]} of one expert, views of the parameters where
    possible."""
    return _known(module).read(module, expert)


def expert_forward(
    module: Any,
    weights: dict[str, Tensor],
    expert: int,
    x: Tensor,
    record: Record | None = None,
    biases: dict[str, Tensor] | None = None,
) -> Tensor:
    """One expert with given matrices, before the routing weight is applied.

    Args:
        module: the experts module; supplies activation, gate function, biases. Its matrices are
            not read.
        weights: {projection: canonical matrix [rows, cols]} in any float dtype; cast to that of
            `x`.
        expert: index, selects the biases.
        x: [n, cols of the first projection].
        record: called with the input of the down projection [n, cols of "down"], if the kind has
            one.
        biases: {projection: [rows]}; read from the module if not given.

    Returns:
        [n, rows of the last projection], dtype of `x`.
    """
    kind = _known(module)
    if biases is None:
        biases = kind.biases(module, module, expert)
    return kind.ffn(
        module, lambda name, h: F.linear(h, weights[name].to(h.dtype)), biases, x, record
    )


def route(module: nn.Module, *args: Any, **kwargs: Any) -> Routed:
    """The arguments of the module's forward in the form that all kinds share."""
    return _known(module).route(module, *args, **kwargs)


def _dense_forward(module: Any, *args: Any, **kwargs: Any) -> Tensor:
    kind = _known(module)
    return route(module, *args, **kwargs).run(
        kind.experts(module), lambda e, x: expert_forward(module, kind.read(module, e), e, x)
    )


def repair(model: nn.Module) -> list[str]:
    """Replaces, on this instance of a dense model, experts forwards that are wrong in transformers
    (see `modules`).

    Returns:
        Paths of the repaired modules; empty for almost every model.
    """
    broken = [
        (path, m) for path, m in model.named_modules() if (k := kind_of(m)) is not None and k.repair
    ]
    for _, module in broken:
        module.forward = partial(_dense_forward, module)
    return [path for path, _ in broken]


def take_any_width(model: Any) -> None:
    """Makes a dense model run its experts one by one if torch's grouped product, which transformers
    chooses, refuses their widths: every row of a matrix has to begin at a multiple of 16 bytes.
    """
    rows = (
        size * p.element_size()
        for module in model.modules()
        if (kind := kind_of(module)) is not None and kind is FUSED
        for p in module.parameters()
        if p.ndim == 3
        for size in p.shape[1:]
    )
    if any(size % _ROW_BYTES for size in rows):
        model.set_experts_implementation("eager")
