"""matched_trace in plain PyTorch, flat: m [B], eps and x [B, d], alpha and sigma [B]."""

from __future__ import annotations


def matched_trace(m, eps, x, alpha, sigma, form="residual"):
    """residual: (d/sigma^2)(1 - m)
    paper:    d/sigma^2 - (alpha^2/sigma^4)(d m - |mean|^2),  alpha mean = x - sigma eps
    """
    d = eps.shape[1]
    if form == "residual":
        return d * (1 - m) / sigma**2
    moved = x - sigma[:, None] * eps  # alpha * mean, so that alpha = 0 needs no division
    return (d - (d * m * alpha**2 - (moved * moved).sum(1)) / sigma**2) / sigma**2
