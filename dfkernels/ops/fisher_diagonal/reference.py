"""fisher_diagonal in the textbook form. Materialises [B, N, d]."""

from __future__ import annotations

from ..posterior.reference import weights


def fisher_diagonal(x, y, alpha, sigma, log_prior=None, *, scale=1.0, offset=0.0):
    """diag F = (1 - sum_i w_i (u_i - epsbar)^2)/sigma^2, [B, *E]."""
    event = x.shape
    x, y, alpha, sigma, _, w = weights(x, y, alpha, sigma, log_prior, scale=scale, offset=offset)
    u = (x[:, None] - alpha[:, None, None] * y) / sigma[:, None, None]
    u = u - (w[..., None] * u).sum(1, keepdim=True)
    return ((1 - (w[..., None] * u * u).sum(1)) / sigma[:, None] ** 2).reshape(event)
