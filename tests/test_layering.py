"""The order of the rooms: what each package of qmoe may import, anywhere in its code.

Imports are read with ast, inside functions too; nothing is run. `ALLOWED` is the drawing: every
room stands below those that it may import, so there is no circle.
"""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VALUES = ("errors", "types", "version", "options")
ALLOWED = {
    **dict.fromkeys(VALUES, ()),
    "system": VALUES,
    "codec": VALUES,
    "quantize": VALUES,
    "source": (*VALUES, "system"),
    "store": (*VALUES, "system", "codec"),
    "kernels": (*VALUES, "codec"),
    "models": (*VALUES, "system", "source"),
    "calib": (*VALUES, "system", "models"),
    "inference": (*VALUES, "system", "codec", "store", "kernels", "models"),
    "compression": (
        *(*VALUES, "system", "codec", "quantize", "source", "store"),
        *("models", "calib"),
    ),
    "publish": (*VALUES, "system", "codec", "store", "models", "inference"),
    "engines": (*VALUES, "system", "store", "models", "inference"),
    "measure": (
        *(*VALUES, "system", "codec", "source", "store", "kernels"),
        *("models", "calib", "inference", "compression"),
    ),
}
FACE = ("", "lazy", "cli", "__main__")  # the top of the house: may import every room


def modules(root=ROOT):
    """Yields (dotted name, path) of every module; the two linked folders under their own names."""
    for folder, name in (("qmoe", "qmoe"), ("kernels", "qmoe.kernels"), ("calib", "qmoe.calib")):
        for path in sorted((root / folder).rglob("*.py")):
            relative = path.relative_to(root / folder)
            if folder == "qmoe" and relative.parts[0] in ("kernels", "calib"):
                continue
            parts = [p for p in relative.with_suffix("").parts if p != "__init__"]
            yield ".".join([name, *parts]), path


def room(module):
    """ "qmoe.codec.encoder.ideal" -> "codec"; "qmoe" -> ""."""
    return [*module.split("."), ""][1]


def imported(source, module):
    """Every name that a module's source imports from qmoe, as dotted names: `from qmoe import x`,
    `import qmoe.x`, relative imports and calls of import_module with a literal, at any depth."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: -node.level]
                base = ".".join([*above, *([base] if base else [])])
            yield from (f"{base}.{a.name}" for a in node.names)
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            argument = node.args[0]
            if name in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                yield str(argument.value)


def violations(source, module):
    """The imports of a module that the drawing does not allow."""
    here = room(module)
    if here in FACE:
        return []
    names = [n for n in imported(source, module) if n.split(".")[0] == "qmoe"]
    return [n for n in names if room(n) != here and room(n) not in ALLOWED[here]]


@pytest.mark.parametrize(("module", "path"), list(modules()))
def test_a_module_imports_only_from_rooms_below(module, path):
    assert room(module) in (*ALLOWED, *FACE), f"{module} is in no room of the drawing"
    assert violations(path.read_text(encoding="utf-8"), module) == []


@pytest.mark.parametrize(
    "source",
    [
        "import qmoe.inference.load",
        "from qmoe.inference.load import load",
        "from qmoe import inference",
        "import qmoe",
        "from ..inference import load",
        "def f():\n    from qmoe.inference import load",
        "def f():\n    import qmoe.inference.load as x",
        "import importlib\nimportlib.import_module('qmoe.inference.load')",
    ],
)
def test_an_import_upwards_is_seen_in_every_form(source):
    assert violations(source, "qmoe.store.reader")


@pytest.mark.parametrize(
    "source", ["from qmoe import codec", "from qmoe.types import ExpertsLayout", "import numpy"]
)
def test_an_import_downwards_is_allowed(source):
    assert violations(source, "qmoe.store.reader") == []


def test_the_drawing_has_no_circle():
    placed = []
    while left := [r for r in ALLOWED if r not in placed]:
        ready = [r for r in left if set(ALLOWED[r]) <= set(placed)]
        assert ready, f"these rooms import one another: {left}"
        placed += ready


def test_every_permission_is_used():
    used = {
        (room(m), room(n))
        for m, p in modules()
        for n in imported(p.read_text(encoding="utf-8"), m)
        if n.startswith("qmoe.")
    }
    unused = [
        (a, b)
        for a, below in ALLOWED.items()
        for b in below
        if b not in VALUES and (a, b) not in used
    ]
    assert unused == []


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
