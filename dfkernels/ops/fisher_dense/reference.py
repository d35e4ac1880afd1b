"""fisher_dense in the textbook form. Materialises [B, N, d]."""

from __future__ import annotations

import torch

from ..posterior.reference import weights


def fisher_dense(x, y, alpha, sigma, log_prior=None, *, scale=1.0, offset=0.0):
    """F = (I - Cov_w(u))/sigma^2, [B, d, d]."""
    x, y, alpha, sigma, _, w = weights(x, y, alpha, sigma, log_prior, scale=scale, offset=offset)
    u = (x[:, None] - alpha[:, None, None] * y) / sigma[:, None, None]
    u = u - (w[..., None] * u).sum(1, keepdim=True)
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return (eye - (w[..., None] * u).mT @ u) / sigma[:, None, None] ** 2
