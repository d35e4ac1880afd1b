"""What `dfkernels posterior` writes for each query, of a data set in memory or in many files."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cloud import PointCloud
from ..fisher import DiffusionFisher
from ._reporting import Callback
from .sharded import ShardedCloud

__all__ = ["FIELDS", "posterior_sums"]

FIELDS = ("log_prob", "mean", "score", "fisher_trace", "ess")


@torch.no_grad()
def posterior_sums(
    x: Tensor,
    cloud: PointCloud | ShardedCloud,
    alpha: float,
    sigma: float,
    callback: Callback | None = None,
) -> dict[str, Tensor]:
    """log_prob [B], mean ``[B, *E]``, score ``[B, *E]``, fisher_trace [B] and ess [B] of queries x
    ``[B, *E]`` in their dtype.

    Args:
        callback: callback(rows, all rows) after each block of atoms that was read from files.

    Raises:
        TypeError, ValueError: An argument is wrong, or a file has changed.
    """
    if isinstance(cloud, PointCloud):
        at = DiffusionFisher(x, cloud, alpha, sigma)
        found = (at.log_prob, at.denoised, at.score, at.trace(), at.ess)
    else:
        part = cloud.partial(x, alpha, sigma, callback=callback)
        log_prob, mean, trace, ess = part.posterior()
        found = (log_prob, mean, part.score(), trace, ess)
    return dict(zip(FIELDS, found, strict=True))
