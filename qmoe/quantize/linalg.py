"""Cholesky factors of damped Hessians, batched over experts, in float64."""

import torch
from torch import Tensor

_LEAF = 128  # columns that LAPACK factors at once
_DENSE = 512  # columns up to which triangular matrices are multiplied as dense ones
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


def shrunk(hessian: Tensor, layer_hessian: Tensor | None, tau: float | Tensor) -> Tensor:
    """``(H_e + tau * L) / (1 + tau)``, L the layer's with the trace of H_e: borrows directions.

    The trace stays, so that a rarely used expert stays unimportant.

    Args:
        hessian: float [E, cols, cols].
        layer_hessian: float [cols, cols] or None.
        tau: share, one or [E].

    Returns:
        float64 [E, cols, cols].
    """
    h = hessian.double()
    if layer_hessian is None:
        return h
    layer = layer_hessian.to(h.device).double()
    size = h.diagonal(dim1=-2, dim2=-1).sum(-1) / layer.diagonal().sum().clamp_min(1e-300)
    share = torch.as_tensor(tau, dtype=h.dtype, device=h.device).expand(len(h))
    return (h + (share * size)[:, None, None] * layer) / (1 + share)[:, None, None]


def inverse_factor(hessian: Tensor) -> tuple[Tensor, list[str]]:
    """Upper U with ``U^T U = H^-1``; GPTQ's column errors weigh 1 / U_jj^2.

    H = R R^T with R upper (Cholesky from the last column backwards), U = R^-1; H is never inverted.

    Args:
        hessian: float64 [E, cols, cols], symmetric, finite, damped by the caller.

    Returns:
        U, float64 [E, cols, cols]; notes, one per expert: "" or by how much the diagonal had to be
        raised.
    """
    upper = torch.zeros_like(hessian)
    info = _factor(hessian.clone(), upper)
    notes = [""] * len(hessian)
    extra = 1e-2
    for _ in range(ESCALATIONS):
        failed = info.nonzero().flatten()
        if len(failed) == 0:
            break
        again = torch.zeros_like(hessian[failed])
        info[failed] = _factor(damped(hessian[failed], extra), again)
        upper[failed] = again
        for e in failed.tolist():
            notes[e] = f"singular Hessian: diagonal raised by {extra:g} of its mean"
        extra *= 10
    else:
        if info.any():
            e = int(info.nonzero()[0])
            raise ValueError(f"Hessian of expert {e} is not positive definite, its diagonal raised")
    return upper, notes


def _factor(h: Tensor, upper: Tensor) -> Tensor:
    """Writes U of h into `upper` (zero below the diagonal) and overwrites h; by halves, so that all
    but the smallest pieces are matrix products.

    H = [[A, B], [B^T, C]], U = [[U1, -U1 S U2], [0, U2]] with U2 of C, S = B U2^T, U1 of A - S S^T.

    Returns:
        int32 [E], other than 0 where h is not positive definite.
    """
    n = h.shape[-1]
    singular: Tensor
    if n <= _LEAF:
        lower, singular = torch.linalg.cholesky_ex(h.flip(-1, -2))
        eye = torch.eye(n, dtype=h.dtype, device=h.device).expand_as(h)
        inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
        upper.copy_(inverse.flip(-1, -2))
        return singular
    m = n // 2
    first, last = upper[:, :m, :m], upper[:, m:, m:]
    singular = _factor(h[:, m:, m:], last)
    s = times_upper_t(h[:, :m, m:], last)
    singular = singular | _factor(h[:, :m, :m].baddbmm_(s, s.mT, alpha=-1), first)
    upper[:, :m, m:] = times_upper_t(times_upper(s, last).mT, first).mT.neg()
    return singular


def times_upper(a: Tensor, upper: Tensor) -> Tensor:
    """``a @ upper`` without most of the products with the zeros below its diagonal.

    Args:
        a: float [E, rows, cols].
        upper: float [E, cols, cols].
    """
    n = upper.shape[-1]
    if n <= _DENSE:
        return a @ upper
    m = n // 2
    left = times_upper(a[:, :, :m], upper[:, :m, :m])
    right = times_upper(a[:, :, m:], upper[:, m:, m:])
    return torch.cat([left, right.baddbmm_(a[:, :, :m], upper[:, :m, m:])], -1)


def times_upper_t(a: Tensor, upper: Tensor) -> Tensor:
    """``a @ upper^T`` without most of the products with zeros; see `times_upper`."""
    n = upper.shape[-1]
    if n <= _DENSE:
        return a @ upper.mT
    m = n // 2
    left = times_upper_t(a[:, :, :m], upper[:, :m, :m])
    right = times_upper_t(a[:, :, m:], upper[:, m:, m:])
    return torch.cat([left.baddbmm_(a[:, :, m:], upper[:, :m, m:].mT), right], -1)
