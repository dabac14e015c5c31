"""Whether the kernels compute on a device what they must: once, with the first projection that is
packed for it. On a mismatch or an exception the next simpler way is tried, with one warning.

Compilers, drivers and GPUs are younger than this code; a wrong result must not pass in silence.
"""

import warnings
from dataclasses import replace

import torch

from qmoe.kernels.launch import LaunchPlan, choose, plan_of
from qmoe.kernels.pack import PackedProjection
from qmoe.kernels.project import guard, project, runs_kernels, weights
from qmoe.kernels.twins import weights_torch

TOLERANCE = 2e-2  # relative rms of a product in bf16

_verdicts: dict[torch.device, bool] = {}


def plain(plan: LaunchPlan) -> LaunchPlan:
    """The same without shared memory, and without launches that overlap."""
    return replace(plan, shared=False, warps=1, pdl=False)


def problem(p: PackedProjection, plan: LaunchPlan) -> str:
    """What is wrong with the kernels by a plan, in a few words; empty if nothing is.

    Decoded weights must be the twin's bit for bit, products of one pair, of several and of decoded
    experts the plain loop's bit for bit and those of the weights in tolerance.
    """
    device = p.words.device
    with guard(device):
        want = weights_torch(p, 0)
        if not torch.equal(weights(p, 0, plan=plan), want):
            return "decoded weights differ from the definition"
        g = torch.Generator().manual_seed(0)
        x = torch.randn(2, p.cols, generator=g).to(device, torch.bfloat16)
        index = torch.zeros(2, dtype=torch.long, device=device)
        exact = x.float() @ want.T
        for batch in (1, 2, 0):
            y = project(p, x, index, 1, plan, batch)
            error = (y.float() - exact).norm() / exact.norm().clamp_min(1e-30)
            if not float(error) <= TOLERANCE:
                return f"a product is wrong by {float(error):.1e}"
            if plan.shared and not torch.equal(y, project(p, x, index, 1, plain(plan), batch)):
                return "shared memory and the plain loop differ"
    return ""


def trusted(p: PackedProjection) -> bool:
    """Whether kernels may run on p's device; checks once a device, and warns once.

    If what the plan says is wrong, the plain loop is tried, and chosen for the device.
    """
    device = p.words.device
    if not runs_kernels(device):
        return True  # the definition itself
    if device not in _verdicts:
        _verdicts[device] = _decide(p, plan_of(device))
    return _verdicts[device]


def _decide(p: PackedProjection, plan: LaunchPlan) -> bool:
    device = p.words.device
    for candidate, other in ((plan, "the plain loop runs instead"), (plain(plan), "")):
        try:
            found = problem(p, candidate)
        except Exception as e:  # whatever a compiler or a driver raises
            found = (
                f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"
            )
        if not found:
            if candidate is not plan:
                choose(device, candidate)
            return True
        then = other or "experts are decoded on the CPU"
        warnings.warn(f"qmoe's kernels fail on {device}: {found}; {then}", stacklevel=2)
    return False
