"""Which device a command runs on."""

import torch

from qmoe.errors import UnsupportedModelError


def pick_device(name: str) -> torch.device:
    """The device of a `--device` value: "auto" is the first CUDA device if there is one, else the
    CPU.

    Raises:
        UnsupportedModelError: a device that torch does not know or that this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"--device {name}: not a device; use auto, cpu, cuda or cuda:N"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UnsupportedModelError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedModelError(f"--device {name}: only cpu and cuda are supported")
    return device
