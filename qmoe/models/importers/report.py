"""What `qmoe import` says at the end."""

from typing import Any

from qmoe.models.importers.writing import Imported


def as_dict(done: Imported) -> dict[str, Any]:
    """The JSON of `qmoe import`: every tensor of the source is among `used` or `ignored`."""
    return {
        "directory": str(done.directory),
        "parameters": done.parameters,
        "tensors": {"used": len(done.used), "ignored": len(done.ignored)},
        "ignored": list(done.ignored),
        "notes": list(done.notes),
    }


def text(done: Imported) -> str:
    """The result for people."""
    lines = [
        f"{done.directory}: {done.parameters / 1e6:.2f} M parameters from {len(done.used)} tensors"
    ]
    if done.ignored:
        lines.append(f"without a meaning for inference, left out: {', '.join(done.ignored)}")
    lines += [f"note: {note}" for note in done.notes]
    lines.append(f"next: qmoe compress {done.directory} OUT --calib TEXT")
    return "\n".join(lines)
