"""mixture_posterior in the textbook form: differences, a softmax, sums. Materialises [B, N, d]."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch.types import Level


class Components(NamedTuple):
    """What every query sees of the components, in the notation of the package's docstring."""

    log_q: Tensor  # [B]
    w: Tensor  # [B, N]
    score: Tensor  # [B, N, d], the s_i
    precision: Tensor  # [B, N, d], the 1/tau_i^2
    mean: Tensor  # [B, N, d]: of x_0, where the component is given


def components(
    x: Tensor,
    y: Tensor,
    variance: Tensor | float,
    alpha: Level,
    sigma: Level,
    log_prior: Tensor | None = None,
    *,
    scale: float = 1.0,
    offset: float = 0.0,
) -> Components:
    """The posterior weights of the components and what each of them alone would give.

    A component without weight, masked or too far away, is replaced by the query's heaviest one, so
    that NaN, infinity and overflow in it reach neither results nor derivatives.
    """
    B, N, d = x.shape[0], y.shape[0], math.prod(x.shape[1:])
    variance = torch.as_tensor(variance, dtype=x.dtype, device=x.device)
    rows = 1 if variance.dim() == 0 else variance.shape[0]
    variance = variance.reshape(rows, -1).expand(N, d)
    x, y = x.reshape(B, 1, d), y.reshape(N, d).to(x.dtype) * scale + offset
    a, s = (
        torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(B)[:, None, None]
        for t in (alpha, sigma)
    )
    log_pi = torch.log_softmax(x.new_zeros(N) if log_prior is None else log_prior, 0)

    def logits(y: Tensor, variance: Tensor, log_pi: Tensor) -> Tensor:
        tau2 = s**2 + a**2 * variance
        square = (x - a * y) ** 2 / tau2 + torch.log(2 * math.pi * tau2)
        return torch.where(log_pi == -math.inf, -math.inf, log_pi - 0.5 * square.sum(-1))

    with torch.no_grad():
        before = logits(y, variance, log_pi)
        weighs, heaviest = torch.softmax(before, 1) != 0, before.argmax(1)
    y, variance = (
        torch.where(weighs[..., None], t, t.detach()[heaviest][:, None]) for t in (y, variance)
    )
    found = logits(y, variance, torch.where(weighs, log_pi, -math.inf))
    precision = 1 / (s**2 + a**2 * variance)
    difference = x - a * y
    return Components(
        torch.logsumexp(found, 1),
        torch.softmax(found, 1),
        -difference * precision,
        precision,
        y + a * variance * precision * difference,
    )


def mixture_posterior(
    x: Tensor,
    y: Tensor,
    variance: Tensor | float,
    alpha: Level,
    sigma: Level,
    log_prior: Tensor | None = None,
    *,
    scale: float = 1.0,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log_prob = log sum_i pi_i N(x; alpha y_i, tau_i^2), score = sum w s, and so on as in the
    package's docstring.

    Returns:
        log_prob [B], mean ``[B, *E]``, fisher_trace [B], ess [B], score ``[B, *E]``; differentiable
        by ordinary autograd.
    """
    log_q, w, s, precision, mean = components(
        x, y, variance, alpha, sigma, log_prior, scale=scale, offset=offset
    )
    each = w[..., None]
    score = (each * s).sum(1)
    trace = (each * (precision - (s - score[:, None]) ** 2)).sum((1, 2))
    mean = (each * mean).sum(1).reshape(x.shape)
    return log_q, mean, trace, 1 / (w * w).sum(1), score.reshape(x.shape)
