"""``select_atoms`` in plain PyTorch: the smallest sets that it may return, from all logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.common.moments import load


def logits(
    x: Tensor,
    y: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    log_prior: Tensor | None,
    scale: float,
    offset: float,
) -> Tensor:
    """log pi_i - |x - alpha y_i|^2 / (2 sigma^2), [B, N] in float64, with pi as given."""
    atoms = load(y, torch.float64, scale, offset)
    pairs = zip(x.double(), alpha.double(), strict=True)
    distance = torch.stack([(q - a * atoms).square().sum(1) for q, a in pairs])
    prior = 0.0 if log_prior is None else log_prior.double()
    return prior - distance / (2 * sigma.double()[:, None] ** 2)


def select_atoms(
    x: Tensor,
    y: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    log_prior: Tensor | None,
    scale: float,
    offset: float,
    gap: float,
    k: int,
) -> Tensor:
    """bool [B, N]: the atoms whose logit is at most `gap` below the k-th largest."""
    found = logits(x, y, alpha, sigma, log_prior, scale, offset)
    return found >= found.topk(k, 1).values[:, -1:] - gap
