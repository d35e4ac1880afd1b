"""mixture_diagonal in the textbook form. Materialises [B, N, d]."""

from __future__ import annotations

from torch import Tensor

from ..._torch.types import Level
from ..mixture_posterior.reference import components


def mixture_diagonal(
    x: Tensor,
    y: Tensor,
    variance: Tensor | float,
    alpha: Level,
    sigma: Level,
    log_prior: Tensor | None = None,
    *,
    scale: float = 1.0,
    offset: float = 0.0,
) -> Tensor:
    """diag F = sum w (1/tau_i^2 - (s_i - s)^2), ``[B, *E]``."""
    _, w, s, precision, _ = components(
        x, y, variance, alpha, sigma, log_prior, scale=scale, offset=offset
    )
    s = s - (w[..., None] * s).sum(1, keepdim=True)
    return (w[..., None] * (precision - s * s)).sum(1).reshape(x.shape)
