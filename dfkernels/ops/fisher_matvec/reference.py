"""fisher_matvec in the textbook form. Materialises [B, N, d]."""

from __future__ import annotations

from ..posterior.reference import weights


def fisher_matvec(x, y, v, alpha, sigma, log_prior=None, *, scale=1.0, offset=0.0):
    """F v = (v - sum_i w_i (u_i - epsbar) <u_i - epsbar, v>)/sigma^2, [B, *E] or [B, K, *E]."""
    shape = v.shape
    x, y, alpha, sigma, _, w = weights(x, y, alpha, sigma, log_prior, scale=scale, offset=offset)
    v = v.reshape(x.shape[0], -1 if v.numel() else shape[1], x.shape[1])
    u = (x[:, None] - alpha[:, None, None] * y) / sigma[:, None, None]
    u = u - (w[..., None] * u).sum(1, keepdim=True)
    cov = (w[:, None] * (v @ u.mT)) @ u
    return ((v - cov) / sigma[:, None, None] ** 2).reshape(shape)
