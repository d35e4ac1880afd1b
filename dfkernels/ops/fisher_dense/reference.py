"""fisher_dense in the textbook form. Materialises [B, N, d]."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._torch.types import Level
from ..posterior.reference import weights


def fisher_dense(
    x: Tensor,
    y: Tensor,
    alpha: Level,
    sigma: Level,
    log_prior: Tensor | None = None,
    *,
    scale: float = 1.0,
    offset: float = 0.0,
) -> Tensor:
    """F = (I - Cov_w(u))/sigma^2, [B, d, d]."""
    x, y, a, s, _, w = weights(x, y, alpha, sigma, log_prior, scale=scale, offset=offset)
    u = (x[:, None] - a[:, None, None] * y) / s[:, None, None]
    u = u - (w[..., None] * u).sum(1, keepdim=True)
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return (eye - (w[..., None] * u).mT @ u) / s[:, None, None] ** 2
