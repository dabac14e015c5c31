"""Cholesky factors of damped Hessians, batched over experts, in float64."""

import torch
from torch import Tensor

ESCALATIONS = 8  # each multiplies the damping by ten: from 1e-2 of the mean diagonal to 1e6 of it


def damped(hessian: Tensor, damping: float) -> Tensor:
    """``H + damping * mean(diag H) * I`` in float64.

    Args:
        hessian: float [E, cols, cols].
        damping: relative to the mean of the diagonal. A zero Hessian becomes a tiny multiple of the
            identity.

    Returns:
        float64 [E, cols, cols].
    """
    h = hessian.double().clone()
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    diagonal += (damping * diagonal.mean(-1, keepdim=True)).clamp_min(1e-30)
    return h


def shrunk(hessian: Tensor, layer_hessian: Tensor | None, tau: float) -> Tensor:
    """``H_e + tau * trace(H_e) / trace(H_layer) * H_layer``: directions borrowed from the layer.

    The layer's Hessian enters normalised to the expert's own size, so that a rarely used expert
    stays unimportant.

    Args:
        hessian: float [E, cols, cols].
        layer_hessian: float [cols, cols] or None.
        tau: share; 0 leaves the Hessian alone.

    Returns:
        float64 [E, cols, cols].
    """
    h = hessian.double()
    if layer_hessian is None or tau == 0:
        return h
    layer = layer_hessian.to(h.device).double()
    size = h.diagonal(dim1=-2, dim2=-1).sum(-1) / layer.diagonal().sum().clamp_min(1e-300)
    return h + (tau * size)[:, None, None] * layer


def inverse_factor(hessian: Tensor) -> tuple[Tensor, list[str]]:
    """Upper U with ``U^T U = H^-1``; GPTQ's column errors weigh 1 / U_jj^2.

    H = R R^T with R upper (Cholesky from the last column backwards), U = R^-1: a factorisation and
    one triangular inverse, a third of the work of inverting H first.

    Args:
        hessian: float64 [E, cols, cols], symmetric, finite, damped by the caller.

    Returns:
        U, float64 [E, cols, cols]; notes, one per expert: "" or by how much the diagonal had to be
        raised.
    """
    h = hessian.flip(-1, -2)
    lower, info = torch.linalg.cholesky_ex(h)
    notes = [""] * len(h)
    extra = 1e-2
    for _ in range(ESCALATIONS):
        failed = info.nonzero().flatten()
        if len(failed) == 0:
            break
        raised = damped(h[failed], extra)
        lower[failed], info[failed] = torch.linalg.cholesky_ex(raised)
        for e in failed.tolist():
            notes[e] = f"singular Hessian: diagonal raised by {extra:g} of its mean"
        extra *= 10
    else:
        if info.any():
            e = int(info.nonzero()[0])
            raise ValueError(f"Hessian of expert {e} is not positive definite, its diagonal raised")
    return _inverse_of_lower(lower).flip(-1, -2).contiguous(), notes


def _inverse_of_lower(lower: Tensor) -> Tensor:
    """Inverse of lower triangular [E, n, n] by halves: a third of the products of a full solve.

    inv [[A, 0], [B, C]] = [[inv A, 0], [-inv C B inv A, inv C]]
    """
    n = lower.shape[-1]
    if n <= 64:
        eye = torch.eye(n, dtype=lower.dtype, device=lower.device).expand_as(lower)
        inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
        return inverse
    m = n // 2
    first, last = _inverse_of_lower(lower[:, :m, :m]), _inverse_of_lower(lower[:, m:, m:])
    inverse = torch.zeros_like(lower)
    inverse[:, :m, :m], inverse[:, m:, m:] = first, last
    inverse[:, m:, :m] = -(last @ lower[:, m:, :m] @ first)
    return inverse
