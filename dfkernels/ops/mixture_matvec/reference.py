"""mixture_matvec in the textbook form. Materialises [B, N, d]."""

from __future__ import annotations

from torch import Tensor

from ..._torch.types import Level
from ..mixture_posterior.reference import components


def mixture_matvec(
    x: Tensor,
    v: Tensor,
    y: Tensor,
    variance: Tensor | float,
    alpha: Level,
    sigma: Level,
    log_prior: Tensor | None = None,
    *,
    scale: float = 1.0,
    offset: float = 0.0,
) -> Tensor:
    """F v = sum w v/tau_i^2 - sum w (s_i - s) <s_i - s, v>, for v ``[B, *E]`` or
    ``[B, K, *E]``."""
    _, w, s, precision, _ = components(
        x, y, variance, alpha, sigma, log_prior, scale=scale, offset=offset
    )
    vectors = v.reshape(x.shape[0], -1 if v.numel() else v.shape[1], s.shape[2])
    s = s - (w[..., None] * s).sum(1, keepdim=True)
    cov = (w[:, None] * (vectors @ s.mT)) @ s
    return ((w[..., None] * precision).sum(1)[:, None] * vectors - cov).reshape(v.shape)
