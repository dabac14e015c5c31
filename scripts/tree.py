"""Prints the source tree with the first line of every module's docstring, for the README."""

import ast
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    for folder in ("qmoe", "kernels", "calib"):
        print(f"{folder}/")
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT / folder)
            if folder == "qmoe" and relative.parts[0] in ("kernels", "calib"):
                continue
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            first = text.split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".")
            print(f"  {relative.as_posix():26s} {textwrap.shorten(first, 92, placeholder=' …')}")


if __name__ == "__main__":
    main()
