"""What makes two runs the same run: whoever goes on with a directory must agree in all of it."""

import hashlib
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from torch import Tensor

from qmoe.compression.job import Job
from qmoe.version import __version__


def identity(job: Job) -> dict[str, Any]:
    """JSON values that name a run: settings, bytes and fingerprint of the source, sha256 of the
    calibration tokens, versions, kind of device.

    Args:
        job: the run, before it has learned anything.
    """
    checkpoint = job.streamed.checkpoint
    source = {"bytes": checkpoint.source_bytes, "fingerprint": checkpoint.fingerprint()}
    return {
        **job.settings.recorded(),
        "source": source,
        "calib_sha256": _digest(job.batches[: len(job.batches) - job.own]),
        "versions": versions(),
        "device": job.device.type,
    }


def versions() -> dict[str, str]:
    """Versions of this package and of those that its results depend on."""
    names = ("torch", "transformers", "safetensors", "numpy", "numba")
    return {"qmoe": __version__, **{n: metadata.version(n) for n in names}}


def _digest(batches: Sequence[dict[str, Tensor]]) -> str:
    """sha256 of the calibration tokens."""
    h = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            h.update(batch[name].long().numpy().tobytes())
    return h.hexdigest()
