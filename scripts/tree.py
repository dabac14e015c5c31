"""Prints the source tree for the README: every room with the first sentence of its docstring."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINKED = {"kernels": "Decode inside the matrix product on a GPU, a torch twin below each op."}
LINKED["calib"] = "What the experts see: text, activations, routing, the model's own words."


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".")


def lines() -> list[str]:
    """The tree, one line a room."""
    rooms = sorted(p for p in (ROOT / "qmoe").iterdir() if (p / "__init__.py").exists())
    shown = [("qmoe/", "Mixture-of-experts models below one bit per expert weight")]
    for path in (ROOT / "qmoe" / f"{name}.py" for name in ("cli", "errors", "types")):
        shown.append((f"  {path.name}", first_sentence(path)))
    for room in rooms:
        shown.append((f"  {room.name}/", first_sentence(room / "__init__.py")))
    shown += [(f"{name}/", text.rstrip(".")) for name, text in LINKED.items()]
    return [f"{name:16s} {text}" for name, text in shown]


if __name__ == "__main__":
    print("\n".join(lines()))
