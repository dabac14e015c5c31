"""Fixtures that several test files share."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

torch.set_num_threads(1)  # several workers share the cores


def _tiny() -> ModuleType:
    """tests/tiny.py by path: with importlib mode, test files cannot import each other."""
    name = "qmoe_tests_tiny"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "tiny.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def pytest_generate_tests(metafunc) -> None:
    """A test that takes `family` without parametrizing it runs for every family."""
    named = {
        n.strip()
        for mark in metafunc.definition.iter_markers("parametrize")
        for n in (mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0])
    }
    if "family" in metafunc.fixturenames and "family" not in named:
        metafunc.parametrize("family", _tiny().FAMILIES)


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """Tiny models of every family and source format: tests/tiny.py."""
    return _tiny()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Callable[[str], Path]:
    """``tiny_checkpoint(family)``: directory of a float32 checkpoint, made once per session; do not
    write to it.
    """
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = _tiny().save(family, tmp_path_factory.mktemp("tiny") / family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def build_model() -> Callable[..., object]:
    """``build(family, seed=0, **changes)``: a tiny random float32 model in eval mode."""
    return lambda family, seed=0, **changes: _tiny().make(family, seed=seed, **changes)


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
