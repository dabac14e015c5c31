"""A module imports only from lower layers (docs: CONTRIBUTING, "Layers"). Imports are read with
ast; nothing is run.
"""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# order matters: the first prefix that fits a module gives its layer
LAYERS = {
    "qmoe.errors": 0,
    "qmoe.types": 0,
    "qmoe.quantize": 1,
    "qmoe.codec": 1,
    "qmoe.kernels": 1,
    "qmoe.durable": 1,
    "qmoe.tensorfile": 1,
    "qmoe.parallel": 1,
    "qmoe.sources": 2,
    "qmoe.checkpoint": 2,
    "qmoe.manifest": 2,
    "qmoe.stream": 2,
    "qmoe.block": 2,
    "qmoe.container": 2,
    "qmoe.families": 2,
    "qmoe.models": 2,
    "qmoe.fit": 3,
    "qmoe.modelclass": 3,
    "qmoe.partial": 3,
    "qmoe.plain_loading": 3,
    "qmoe.host": 3,
    "qmoe.experts": 3,
    "qmoe.calib": 3,
}
TOP = 4  # everything else in the package
FORBIDDEN = {  # edges inside the allowed direction that the architecture rules out
    "qmoe.quantize": {"qmoe.codec", "qmoe.kernels"},
    "qmoe.codec": {"qmoe.quantize", "qmoe.kernels"},
    "qmoe.kernels": {"qmoe.quantize"},
    "qmoe.container": {"qmoe.quantize", "qmoe.kernels"},
    "qmoe.checkpoint": {"qmoe.quantize", "qmoe.codec", "qmoe.kernels"},
    "qmoe.experts": {"qmoe.quantize", "qmoe.calib"},
    "qmoe.calib": {"qmoe.quantize", "qmoe.codec"},
    "qmoe.load": {"qmoe.quantize", "qmoe.calib", "qmoe.compress"},
}


def _modules():
    for folder, name in (("qmoe", "qmoe"), ("kernels", "qmoe.kernels"), ("calib", "qmoe.calib")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT / folder)
            if folder == "qmoe" and relative.parts[0] in ("kernels", "calib"):
                continue  # the links; walked under their own names
            parts = [p for p in relative.with_suffix("").parts if p != "__init__"]
            yield ".".join([name, *parts]), path


def _layer(module):
    fit = [p for p in LAYERS if module == p or module.startswith(p + ".")]
    return LAYERS[max(fit, key=len)] if fit else TOP


def _imports(path):
    """Imports that run when the module is imported (not those inside functions)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)
        for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in inner:
            yield node.module
        elif isinstance(node, ast.Import) and id(node) not in inner:
            yield from (a.name for a in node.names)


@pytest.mark.parametrize(("module", "path"), list(_modules()))
def test_imports_point_downwards(module, path):
    for target in _imports(path):
        if not target.startswith("qmoe.") or module in ("qmoe.cli", "qmoe"):
            continue
        package = module.rsplit(".", 1)[0]
        same = (
            target.startswith(package + ".")
            or target == package
            or target.split(".")[1] == module.split(".")[1]
        )
        assert same or _layer(target) <= _layer(module), (
            f"{module} (layer {_layer(module)}) imports {target}"
        )
        for prefix, banned in FORBIDDEN.items():
            if module == prefix or module.startswith(prefix + "."):
                assert not any(target == b or target.startswith(b + ".") for b in banned), (
                    f"{module} -> {target}"
                )


def test_the_two_folders_are_found_under_qmoe():
    assert importlib.util.find_spec("qmoe.calib.walk") is not None
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "calib" / "__init__.py").exists()


def test_repository_root_does_not_shadow_the_hub_kernels_package():
    # transformers probes for a package called `kernels`; a regular package of that name in the root
    # would break it
    code = (
        "import sys; sys.path.insert(0, '.'); from transformers.utils import import_utils as i; "
        "print(i.is_kernels_available())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    installed = importlib.util.find_spec("kernels")
    real = installed is not None and installed.origin is not None
    assert out.stdout.strip() == str(real)
