"""average in the textbook form: differences, a softmax, weighted sums. Materialises [B, N, d] and
[B, N, p]."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._torch.types import Level
from ..posterior.reference import weights


def average(
    x: Tensor,
    y: Tensor,
    values: Tensor,
    alpha: Level,
    sigma: Level,
    log_prior: Tensor | None = None,
    *,
    scale: float = 1.0,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """log_prob = logsumexp_i(l_i) - (d/2) log(2 pi sigma^2) and average = sum_i w_i values_i, w =
    softmax(l) and l_i = log pi_i - |x - alpha y_i|^2/(2 sigma^2).

    Returns:
        log_prob [B], average ``[B, *P]`` for values ``[N, *P]``; differentiable by ordinary
        autograd.
    """
    _, _, _, _, log_q, w = weights(x, y, alpha, sigma, log_prior, scale=scale, offset=offset)
    flat = values.reshape(values.shape[0], -1).to(w.dtype)
    flat = torch.where((w != 0)[..., None], flat, 0.0)  # whatever a weightless atom has
    return log_q, torch.einsum("bn,bnp->bp", w, flat).reshape(w.shape[0], *values.shape[1:])
