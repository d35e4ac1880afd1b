"""third_moment in the textbook form. Materialises [B, N, d]."""

from __future__ import annotations

from torch import Tensor

from dfkernels._torch.types import Level
from dfkernels.ops.posterior.reference import weights


def third_moment(
    x: Tensor,
    y: Tensor,
    alpha: Level,
    sigma: Level,
    log_prior: Tensor | None = None,
    *,
    scale: float = 1.0,
    offset: float = 0.0,
) -> Tensor:
    """sum_i w_i (y_i - mean)^3, elementwise, ``[B, *E]``."""
    _, atoms, _, _, _, w = weights(x, y, alpha, sigma, log_prior, scale=scale, offset=offset)
    t = atoms - (w[..., None] * atoms).sum(1, keepdim=True)
    return (w[..., None] * t * t * t).sum(1).reshape(x.shape)
