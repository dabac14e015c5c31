"""Fixtures that several test files share."""

import copy
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import generic as generic_checks
import hub
import pytest
import tiny as tiny_models
import torch
from transformers import PreTrainedModel

from qmoe.compression.coding import encode_experts
from qmoe.models.classes import plain_config
from qmoe.models.families.find import KINDS, find_experts, read_expert
from qmoe.store.writer import ContainerWriter
from qmoe.types import QuantizedMatrix, grid_index, grid_scale

torch.set_num_threads(1)  # several workers share the cores
# a background shell starts its children with interrupts ignored; the tests send them
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_generate_tests(metafunc) -> None:
    """A test that takes `family` without parametrizing it runs for every family."""
    named = {
        n.strip()
        for mark in metafunc.definition.iter_markers("parametrize")
        for n in (mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0])
    }
    if "family" in metafunc.fixturenames and "family" not in named:
        metafunc.parametrize("family", tiny_models.FAMILIES)


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """Tiny models of every family and source format: tests/tiny.py."""
    return tiny_models


@pytest.fixture(scope="session")
def generic() -> ModuleType:
    """The whole path, and tiny models of every type with the fused interface: tests/generic.py."""
    return generic_checks


@pytest.fixture(scope="session")
def table_row() -> Callable[[str, dict[str, object]], None]:
    """``table_row(table, row)``: keeps what a test proved about a family. scripts/families runs
    the tests and makes docs/families.md of the rows."""
    folder = os.environ.get("QMOE_FAMILY_ROWS")

    def keep(table: str, row: dict[str, object]) -> None:
        if folder:
            name = "".join(c if c.isalnum() else "_" for c in f"{table} {row['family']}")
            file = Path(folder) / f"{name}--{row['kind']}.json"
            assert not file.exists(), f"two rows for {row['family']}"
            file.write_text(json.dumps({"table": table, **row}))

    return keep


@pytest.fixture
def serve_hub() -> Iterator[Callable[..., object]]:
    """``serve_hub(files, repo=..., exists=...)``: a running stand-in of the hub (tests/hub.py)."""
    running = []

    def start(files: dict[str, bytes], **options: object) -> object:
        running.append(hub.start(files, **options))
        return running[-1]

    yield start
    for server in running:
        server.before = lambda file: None
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Callable[[str], Path]:
    """``tiny_checkpoint(family)``: directory of a float32 checkpoint, made once per session; do not
    write to it.
    """
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tiny_models.save(family, tmp_path_factory.mktemp("tiny") / family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def build_model() -> Callable[..., object]:
    """``build(family, seed=0, **changes)``: a tiny random float32 model in eval mode."""
    return lambda family, seed=0, **changes: tiny_models.make(family, seed=seed, **changes)


@pytest.fixture(scope="session")
def model_inputs() -> Callable[..., dict[str, torch.Tensor]]:
    """Token batches for any model of `build_model`."""

    def inputs(model) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(5)
        out = {"input_ids": torch.randint(3, 127, (2, 12), generator=g)}
        if model.config.is_encoder_decoder:
            out["decoder_input_ids"] = torch.randint(3, 127, (2, 7), generator=g)
        return out

    return inputs


def _round(weight: torch.Tensor) -> QuantizedMatrix:
    """Rounds to -2..2 with one scale per row; enough for tests of everything but solvers."""
    index = grid_index(weight.abs().mean(1) * 1.5, step=4)
    codes = (weight / grid_scale(index)[:, None]).round().clamp(-2, 2).to(torch.int8)
    return QuantizedMatrix(codes, index, torch.zeros(weight.shape[1], dtype=torch.int16))


def _block_of(name: str) -> str:
    """The block that a tensor belongs to: its path up to the first number, or "rest"."""
    parts = name.split(".")
    at = next((i for i, p in enumerate(parts) if p.isdecimal()), None)
    return "rest" if at is None else ".".join(parts[: at + 1])


def _write(model: PreTrainedModel, out: Path, **options: object) -> PreTrainedModel:
    """Rounds the experts of a model and writes it compressed; returns a dense copy with the
    rounded weights."""
    dense = copy.deepcopy(model)
    found = {layout.path: (layout, module) for layout, module in find_experts(dense)}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    tensors = {k: v for k, v in model.state_dict().items() if k not in tied}
    for layout, module in found.values():
        for name in KINDS[layout.kind].encoded(module):
            del tensors[f"{layout.path}.{name}"]
    blocks = list(dict.fromkeys(_block_of(n) for n in [*tensors, *found]))
    with ContainerWriter(out, **options) as writer:
        for name in blocks:
            with writer.block(name) as block:
                for key, tensor in tensors.items():
                    if _block_of(key) == name:
                        block.add_tensor(key, tensor)
                for path, (layout, module) in found.items():
                    if _block_of(path) != name:
                        continue
                    experts = block.experts(layout)
                    rounded = [
                        {k: _round(w) for k, w in read_expert(module, e).items()}
                        for e in range(layout.experts)
                    ]
                    for p in layout.projections:
                        matrices = [r[p.name] for r in rounded]
                        half = layout.experts // 2
                        for some in (range(half), range(half, layout.experts)):
                            part = matrices[some.start : some.stop]
                            experts.add_batch(encode_experts(p.name, some, part))
                    for e, r in enumerate(rounded):
                        weights = {k: m.dequantize() for k, m in r.items()}
                        KINDS[layout.kind].write(module, e, weights)
                    tokens = [3 * e for e in range(layout.experts)]
                    notes = ["no tokens: rounded" if not t else "" for t in tokens]
                    block.finish_experts(path, tokens, notes)
        config = plain_config(model.config) | {"architectures": [type(model).__name__]}
        writer.finish(
            blocks,
            config=config | {"dtype": "float32"},
            settings={"method": "round"},
            versions={"qmoe": "test"},
            source={"name": "random", "bytes": 1000},
            files={
                "generation_config.json": model.generation_config.to_json_string().encode(),
                "tokenizer_config.json": b"{}\n",
            },
        )
    return dense


@pytest.fixture(scope="session")
def write_compressed() -> Callable[..., PreTrainedModel]:
    """``write(model, out, **options of ContainerWriter)`` -> dense model with the rounded
    weights."""
    return _write


@pytest.fixture(scope="session")
def compressed(
    tmp_path_factory: pytest.TempPathFactory, build_model: Callable[..., PreTrainedModel]
) -> tuple[Path, PreTrainedModel]:
    """A compressed tiny Mixtral (not to be changed) and its dense equal."""
    out = tmp_path_factory.mktemp("compressed") / "mixtral"
    return out, _write(build_model("mixtral"), out)
