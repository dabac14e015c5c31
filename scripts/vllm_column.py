"""The column "vLLM" of docs/families.md, from docs/families-vllm.json (written by
`scripts/families_vllm`)."""

import json
from pathlib import Path

ROWS = Path(__file__).resolve().parent.parent / "docs" / "families-vllm.json"
NAME = "vLLM 0.32, CPU"
_BEGIN, _END = "## Families as they are published", "## Types with"


def fill(page: str) -> str:
    """The page with the column last in the table of published families; an old one is replaced."""
    rows = json.loads(ROWS.read_text("utf-8")) if ROWS.exists() else {}
    before, begin, rest = page.partition(_BEGIN)
    table, end, after = rest.partition(_END)
    out, had = [], f"| {NAME} |" in table
    for line in table.splitlines():
        if line.startswith("|"):
            cells = line.strip().strip("|").split("|")
            cells = cells[:-1] if had else cells
            cells.append(_cell(cells, rows))
            line = "|" + "|".join(cells) + "|"
        out.append(line)
    return before + begin + "\n".join(out) + "\n" + end + after


def _cell(cells: list[str], rows: dict[str, dict[str, str]]) -> str:
    kind = cells[1].strip().strip("`")
    if kind == "model type":
        return f" {NAME} "
    if set(kind) == {"-"}:
        return "---"
    row = rows.get(kind)
    if row is None:
        return " not run "
    return f" {'; '.join(t for t in (row['vllm'], row['reason']) if t)} "
