"""Stand-in for the operators over a mixture, in plain PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class MixturePosterior(NamedTuple):
    log_prob: Tensor
    mean: Tensor
    fisher_trace: Tensor
    ess: Tensor
    score: Tensor


def _components(x, y, variance, alpha, sigma, log_prior, scale, offset):
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
    tau2 = s**2 + a**2 * variance
    square = (x - a * y) ** 2 / tau2 + torch.log(2 * math.pi * tau2)
    logits = log_pi - 0.5 * square.sum(-1)
    difference = x - a * y
    return (
        torch.logsumexp(logits, 1),
        torch.softmax(logits, 1),
        -difference / tau2,
        1 / tau2,
        y + a * variance / tau2 * difference,
    )


def mixture_posterior(x, y, variance, alpha, sigma, log_prior=None, *, scale=1.0, offset=0.0):
    log_q, w, s, p, mean = _components(x, y, variance, alpha, sigma, log_prior, scale, offset)
    each = w[..., None]
    score = (each * s).sum(1)
    trace = (each * (p - (s - score[:, None]) ** 2)).sum((1, 2))
    mean = (each * mean).sum(1).reshape(x.shape)
    return MixturePosterior(log_q, mean, trace, 1 / (w * w).sum(1), score.reshape(x.shape))


def mixture_matvec(x, v, y, variance, alpha, sigma, log_prior=None, *, scale=1.0, offset=0.0):
    _, w, s, p, _ = _components(x, y, variance, alpha, sigma, log_prior, scale, offset)
    each = w[..., None]
    t = s - (each * s).sum(1, keepdim=True)
    flat = v.reshape(len(x), -1, t.shape[2])
    out = (each * p).sum(1)[:, None] * flat - (flat @ t.mT * w[:, None]) @ t
    return out.reshape(v.shape)


def mixture_diagonal(x, y, variance, alpha, sigma, log_prior=None, *, scale=1.0, offset=0.0):
    _, w, s, p, _ = _components(x, y, variance, alpha, sigma, log_prior, scale, offset)
    each = w[..., None]
    t = s - (each * s).sum(1, keepdim=True)
    return (each * (p - t**2)).sum(1).reshape(x.shape)
