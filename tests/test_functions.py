"""Functions stay short: at most 60 lines and 7 parameters. Exempt is what a compiler for devices or
numba takes as a whole, seen by its decorator, and the options of the face, which users give by
name."""

import ast
from collections import Counter

import pytest
from test_layering import modules

import qmoe

LINES, PARAMETERS = 60, 7
COMPILERS = ("triton.jit", "gluon.jit", "jit", "njit", "numba.njit", "nb.njit")


def functions(source):
    """(node, whether it is a method) of every function, at any depth."""

    def visit(node, method):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield child, method
            yield from visit(child, isinstance(child, ast.ClassDef))

    yield from visit(ast.parse(source), False)


def long(source, face=()):
    """Names of the functions that are longer or take more than they may."""
    for node, method in functions(source):
        decorators = [ast.unparse(getattr(d, "func", d)) for d in node.decorator_list]
        if any(d in COMPILERS for d in decorators):
            continue
        taken = [*node.args.posonlyargs, *node.args.args]
        if node.name not in face:
            taken += node.args.kwonlyargs
        count = len(taken) - (method and "staticmethod" not in decorators)
        if node.end_lineno - node.lineno + 1 > LINES or count > PARAMETERS:
            yield node.name


def test_functions_are_short():
    face = {name: place.partition(":")[0] for name, place in qmoe._FACE.items()}
    found = Counter()
    for module, path in modules():
        names = [n for n, where in face.items() if where == module]
        found.update((module, n) for n in long(path.read_text(encoding="utf-8"), names))
    assert not found


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def f(a, b, c, d, e, g, h): pass", []),
        ("def f(a, b, c, d, e, g, *, h, i): pass", ["f"]),
        ("class A:\n    def f(self, a, b, c, d, e, g, h): pass", []),
        ("class A:\n    def f(self, a, b, c, d, e, g, h, i): pass", ["f"]),
        ("class A:\n    def f(self):\n        def g(a, b, c, d, e, h, i, j): pass", ["g"]),
        ("@nb.njit(cache=True)\ndef f(a, b, c, d, e, g, h, i): pass", []),
        ("@triton.jit\ndef f(a, b, c, d, e, g, h, i): pass", []),
        ("@cache\ndef f(a, b, c, d, e, g, h, i): pass", ["f"]),
        ("def f():\n" + "    pass\n" * 59, []),
        ("def f():\n" + "    pass\n" * 60, ["f"]),
    ],
)
def test_a_long_function_is_seen(source, names):
    assert list(long(source)) == names


def test_options_of_the_face_are_given_by_name():
    source = "def f(a, b, *, c, d, e, g, h, i): pass"
    assert list(long(source, ["f"])) == []
    assert list(long(source.replace("*, ", ""), ["f"])) == ["f"]
