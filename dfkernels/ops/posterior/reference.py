"""posterior in the textbook form: differences, a softmax, sums. Materialises [B, N, d]."""

from __future__ import annotations

import math

import torch

from ..common.moments import logits, without_the_weightless


def weights(x, y, alpha, sigma, log_prior=None, *, scale=1.0, offset=0.0):
    """Flat views and the softmax. -> x [B, d], y [B, N, d], alpha [B], sigma [B], log_q [B], w [B,
    N]

    y has its atoms per query: one that has no weight there, masked or too far, stands where the
    query's heaviest atom does, so that NaN, infinity and overflow in it reach neither results nor
    derivatives.
    """
    B, N, d = x.shape[0], y.shape[0], math.prod(x.shape[1:])
    x, y = x.reshape(B, d), y.reshape(N, d).to(x.dtype) * scale + offset
    alpha, sigma = (
        torch.as_tensor(a, dtype=x.dtype, device=x.device).expand(B) for a in (alpha, sigma)
    )
    log_pi = torch.log_softmax(x.new_zeros(N) if log_prior is None else log_prior, 0)
    with torch.no_grad():
        first = logits(x, y, alpha, sigma, log_pi)
        heaviest = y[first.argmax(1)]
    y, log_pi = without_the_weightless(torch.softmax(first, 1), y, log_pi, heaviest)
    found = logits(x, y, alpha, sigma, log_pi)
    log_q = torch.logsumexp(found, 1) - 0.5 * d * torch.log(2 * math.pi * sigma**2)
    return x, y, alpha, sigma, log_q, torch.softmax(found, 1)


def posterior(x, y, alpha, sigma, log_prior=None, *, scale=1.0, offset=0.0):
    """-> log_prob [B], mean [B, *E], fisher_trace [B], ess [B]; differentiable by ordinary
    autograd."""
    event = x.shape
    x, y, alpha, sigma, log_q, w = weights(
        x, y, alpha, sigma, log_prior, scale=scale, offset=offset
    )
    mean = (w[..., None] * y).sum(1)
    r = y - mean[:, None]
    variance = (w[..., None] * r * r).sum((1, 2))
    trace = (x.shape[1] - (alpha / sigma) ** 2 * variance) / sigma**2
    return log_q, mean.reshape(event), trace, 1 / (w * w).sum(1)
