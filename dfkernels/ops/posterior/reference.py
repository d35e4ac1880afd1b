"""posterior in the textbook form: differences, a softmax, sums. Materialises [B, N, d]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._torch.types import Level
from ..common.moments import logits, without_weightless


def weights(
    x: Tensor,
    y: Tensor,
    alpha: Level,
    sigma: Level,
    log_prior: Tensor | None = None,
    *,
    scale: float = 1.0,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """w_i = softmax_i(log pi_i - |x - alpha y_i|^2/(2 sigma^2)), and the arguments as flat tensors.

    An atom without weight, masked or too far away, is replaced by the query's heaviest one, so that
    NaN, infinity and overflow in it reach neither results nor derivatives.

    Returns:
        x [B, d], y [B, N, d], alpha [B], sigma [B], log_q [B], w [B, N].
    """
    B, N, d = x.shape[0], y.shape[0], math.prod(x.shape[1:])
    x, y = x.reshape(B, d), y.reshape(N, d).to(x.dtype) * scale + offset
    a, s = (torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(B) for t in (alpha, sigma))
    log_pi = torch.log_softmax(x.new_zeros(N) if log_prior is None else log_prior, 0)
    with torch.no_grad():
        before = logits(x, y, a, s, log_pi)
        heaviest = y[before.argmax(1)]
    y, log_pi = without_weightless(torch.softmax(before, 1), y, log_pi, heaviest)
    found = logits(x, y, a, s, log_pi)
    log_q = torch.logsumexp(found, 1) - 0.5 * d * torch.log(2 * math.pi * s**2)
    return x, y, a, s, log_q, torch.softmax(found, 1)


def posterior(
    x: Tensor,
    y: Tensor,
    alpha: Level,
    sigma: Level,
    log_prior: Tensor | None = None,
    *,
    scale: float = 1.0,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log_prob = logsumexp_i(l_i) - (d/2) log(2 pi sigma^2), mean = sum w y, and so on as in the
    package's docstring.

    Returns:
        log_prob [B], mean ``[B, *E]``, fisher_trace [B], ess [B]; differentiable by ordinary
        autograd.
    """
    event = x.shape
    x, y, a, s, log_q, w = weights(x, y, alpha, sigma, log_prior, scale=scale, offset=offset)
    mean = (w[..., None] * y).sum(1)
    r = y - mean[:, None]
    variance = (w[..., None] * r * r).sum((1, 2))
    trace = (x.shape[1] - (a / s) ** 2 * variance) / s**2
    return log_q, mean.reshape(event), trace, 1 / (w * w).sum(1)
