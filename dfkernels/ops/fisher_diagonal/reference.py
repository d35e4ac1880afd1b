"""fisher_diagonal in the textbook form. Materialises [B, N, d]."""

from __future__ import annotations

from torch import Tensor

from ..._torch.types import Level
from ..posterior.reference import weights


def fisher_diagonal(
    x: Tensor,
    y: Tensor,
    alpha: Level,
    sigma: Level,
    log_prior: Tensor | None = None,
    *,
    scale: float = 1.0,
    offset: float = 0.0,
) -> Tensor:
    """diag F = (1 - sum_i w_i (u_i - epsbar)^2)/sigma^2, ``[B, *E]``."""
    event = x.shape
    x, y, a, s, _, w = weights(x, y, alpha, sigma, log_prior, scale=scale, offset=offset)
    u = (x[:, None] - a[:, None, None] * y) / s[:, None, None]
    u = u - (w[..., None] * u).sum(1, keepdim=True)
    return ((1 - (w[..., None] * u * u).sum(1)) / s[:, None] ** 2).reshape(event)
