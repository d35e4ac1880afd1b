"""log_prob in the textbook form: differences and a logsumexp. Materialises [B, N, d]."""

from __future__ import annotations

from torch import Tensor

from ..._torch.types import Level
from ..posterior.reference import weights


def log_prob(
    x: Tensor,
    y: Tensor,
    alpha: Level,
    sigma: Level,
    log_prior: Tensor | None = None,
    *,
    scale: float = 1.0,
    offset: float = 0.0,
) -> Tensor:
    """logsumexp_i(log pi_i - |x - alpha y_i|^2/(2 sigma^2)) - (d/2) log(2 pi sigma^2), [B];
    differentiable by ordinary autograd."""
    return weights(x, y, alpha, sigma, log_prior, scale=scale, offset=offset)[4]
