"""The k heaviest atoms of each query with their posterior weights: what a noisy sample may be a copy of."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _check
from .cloud import PointCloud
from .fisher import DiffusionFisher, select
from .ops._kinds import load

__all__ = ["TopK", "top_k"]

_BLOCK = 1 << 22  # numbers of y looked at together


class TopK(NamedTuple):
    """index int64 [B, k] and weight [B, k], heaviest first; of equally heavy atoms the earlier one."""

    index: Tensor
    weight: Tensor


@torch.no_grad()
def top_k(
    x: Tensor,
    cloud: PointCloud,
    alpha: float | Tensor,
    sigma: float | Tensor,
    k: int,
    *,
    tolerance: float | None = None,
) -> TopK:
    """The k atoms with the largest weights w_i = softmax_i(log pi_i - |x - alpha y_i|^2 / (2 sigma^2)).

    Args:
        x, cloud, alpha, sigma: as in `DiffusionFisher`.
        k: from 1 to N.
        tolerance: None reads all atoms. With a number in (0, 1) the atoms are found through the cloud's index
            (`cloud.index()`), the same ones, certainly; the weights' normaliser may miss that part of the mass.

    Logits are computed in float64; weights have x's dtype. They carry no graph.

    Raises TypeError or ValueError naming the argument.
    """
    fisher = DiffusionFisher(x, cloud, alpha, sigma, tolerance=tolerance)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(cloud):
        raise _check.mismatch("k", f"an integer from 1 to N = {len(cloud)}", k)
    x, alpha, sigma = (t.detach().double() for t in (fisher.x, fisher.alpha, fisher.sigma))
    total = DiffusionFisher(x, cloud, alpha, sigma, tolerance=tolerance).log_prob
    total += fisher.d * (sigma.log() + 0.5 * math.log(2 * math.pi))  # log sum_i pi_i exp(-|u_i|^2 / 2)
    every = torch.arange(len(cloud), device=x.device)
    rows = [every] * len(x)
    if tolerance is not None and len(x):
        atoms, counts, _ = select(
            fisher.x, cloud, alpha.to(fisher.dtype), sigma.to(fisher.dtype), tolerance, k
        )
        found = iter(atoms.split(counts.clamp_min(0).tolist()))
        rows = [every if n < 0 else some for n, some in zip(counts.tolist(), found, strict=True)]
    best = [_heaviest(*one, cloud, k) for one in zip(x.flatten(1), alpha, sigma, rows, strict=True)]
    if not best:
        return TopK(every.new_empty(0, k), fisher.x.new_empty(0, k))
    index, logits = (torch.stack(t) for t in zip(*best, strict=True))
    return TopK(index, (logits - total[:, None]).exp().to(fisher.dtype))


def _heaviest(x: Tensor, alpha: Tensor, sigma: Tensor, rows: Tensor, cloud: PointCloud, k: int):
    """(index [k], logits [k]) of the largest among some atoms, log pi normalised."""
    y = cloud.y.reshape(len(cloud), -1)
    logits = []
    for some in rows.split(max(1, _BLOCK // cloud.d)):
        atoms = load(y[some], torch.float64, cloud.scale, cloud.offset)
        logits.append(-(((x - alpha * atoms) / sigma) ** 2).sum(1) / 2)
    logits = torch.cat(logits)
    if cloud.log_prior is None:
        logits -= math.log(len(cloud))
    else:
        prior = cloud.log_prior.double()
        logits += prior[rows] - prior.logsumexp(0)
    order = logits.sort(descending=True, stable=True)
    return rows[order.indices[:k]], order.values[:k]
