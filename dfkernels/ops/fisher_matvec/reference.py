"""fisher_matvec in the textbook form. Materialises [B, N, d]."""

from __future__ import annotations

from torch import Tensor

from ..._torch.types import Level
from ..posterior.reference import weights


def fisher_matvec(
    x: Tensor,
    y: Tensor,
    v: Tensor,
    alpha: Level,
    sigma: Level,
    log_prior: Tensor | None = None,
    *,
    scale: float = 1.0,
    offset: float = 0.0,
) -> Tensor:
    """F v = (v - sum_i w_i (u_i - epsbar) <u_i - epsbar, v>)/sigma^2, for v ``[B, *E]`` or
    ``[B, K, *E]``."""
    shape = v.shape
    x, y, a, s, _, w = weights(x, y, alpha, sigma, log_prior, scale=scale, offset=offset)
    v = v.reshape(x.shape[0], -1 if v.numel() else shape[1], x.shape[1])
    u = (x[:, None] - a[:, None, None] * y) / s[:, None, None]
    u = u - (w[..., None] * u).sum(1, keepdim=True)
    cov = (w[:, None] * (v @ u.mT)) @ u
    return ((v - cov) / s[:, None, None] ** 2).reshape(shape)
