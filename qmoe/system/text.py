"""How sizes and tables are written for people."""

from collections.abc import Iterable, Sequence


def size(count: float) -> str:
    """Bytes in MiB or GiB, "1.5 MiB"."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table without a line break at its end; bars inside of cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in lines)
