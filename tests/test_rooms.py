"""Every package says which modules it has."""

import ast
import re

import pytest
from test_layering import ROOT

PACKAGES = sorted(p for p in (ROOT / "qmoe").rglob("__init__.py") if p.parent != ROOT / "qmoe")


@pytest.mark.parametrize("path", PACKAGES, ids=lambda p: p.parent.name)
def test_a_package_lists_its_modules(path):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    lines = [re.match(r"((?:\w+/?)(?:, \w+/?)*)  +\S", line) for line in text.splitlines()]
    listed = [name for line in lines if line for name in line[1].split(", ")]
    modules = {p.stem for p in path.parent.glob("*.py")} - {"__init__"}
    modules |= {f"{p.parent.name}/" for p in path.parent.glob("*/__init__.py")}
    assert sorted(listed) == sorted(modules)
