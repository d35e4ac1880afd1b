"""kept_atoms in plain PyTorch: the smallest set that it may return, from all logits."""

from __future__ import annotations

import torch

from ..ops.common.moments import load


def logits(x, y, alpha, sigma, log_prior, scale, offset):
    """log pi_i - |x - alpha y_i|^2 / (2 sigma^2), [B, N] in float64; pi as given, not
    normalised."""
    atoms = load(y, torch.float64, scale, offset)
    distance = torch.stack(
        [(q - a * atoms).square().sum(1) for q, a in zip(x.double(), alpha.double())]
    )
    prior = 0.0 if log_prior is None else log_prior.double()
    return prior - distance / (2 * sigma.double()[:, None] ** 2)


def kept_atoms(x, y, alpha, sigma, log_prior, scale, offset, gap, k):
    """[B, N]: whose logit is no more than gap below the k-th largest."""
    found = logits(x, y, alpha, sigma, log_prior, scale, offset)
    return found >= found.topk(k, 1).values[:, -1:] - gap
