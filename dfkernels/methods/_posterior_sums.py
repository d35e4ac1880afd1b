"""What `dfkernels posterior` writes for each query, of a data set in memory or in many files."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._io.elsewhere import Elsewhere
from .._io.unfinished import Unfinished
from .._merge import merge
from ..cloud import PointCloud
from ..fisher import DiffusionFisher
from ..partial import Partial
from ._reporting import Callback
from .sharded import ShardedCloud

__all__ = ["FIELDS", "VECTORS", "posterior_sums", "step_bytes"]

FIELDS = ("log_prob", "mean", "score", "fisher_trace", "ess")
VECTORS = ("mean", "score")  # those that have the shape of the queries
SECONDS = 30.0  # between two Partials that are kept


@torch.no_grad()
def posterior_sums(
    x: Tensor,
    cloud: PointCloud | ShardedCloud,
    alpha: float,
    sigma: float,
    work: Unfinished | Elsewhere,
    callback: Callback,
) -> dict[str, np.ndarray]:
    """log_prob [B], mean ``[B, *E]``, score ``[B, *E]``, fisher_trace [B] and ess [B] of queries x
    ``[B, *E]`` in their dtype, for which `work` comes next.

    Over many files it keeps there every now and then what is merged so far, and goes on from what
    is kept.

    Args:
        callback: callback(atoms read, all atoms) at the beginning, after each block of a file, and
            at the end.

    Raises:
        TypeError, ValueError: An argument is wrong, or a file has changed.
    """
    if isinstance(cloud, PointCloud):
        callback(0, len(cloud))
        at = DiffusionFisher(x, cloud, alpha, sigma)
        found = (at.log_prob, at.denoised, at.score, at.trace(), at.ess)
        callback(len(cloud), len(cloud))
    else:
        part = _over_files(x, cloud, alpha, sigma, work, callback)
        log_prob, mean, trace, ess = part.posterior()
        found = (log_prob, mean, part.score(), trace, ess)
    return {name: t.numpy() for name, t in zip(FIELDS, found, strict=True)}


def step_bytes(queries: int, d: int) -> int:
    """Of what is kept of so many queries in d dimensions, at most."""
    return 8 * queries * (d + 3) + 4096


def _over_files(
    x: Tensor,
    cloud: ShardedCloud,
    alpha: float,
    sigma: float,
    work: Unfinished | Elsewhere,
    callback: Callback,
) -> Partial:
    """The Partial of all files: the same bits as `cloud.partial`, whoever was killed between two of
    them. Ranks read their files at the same time, and keep nothing between them."""
    if isinstance(work, Elsewhere) or cloud._files.ranks.size > 1:
        return cloud.partial(x, alpha, sigma, callback=callback)
    read, kept = work.step()
    moments: dict[str, Any] = dict(kept)
    total = replace(cloud.partial(x, alpha, sigma, files=[]), **moments)
    done = sum(cloud._files.sizes[:read])
    callback(done, len(cloud))
    last = time.monotonic()
    for i in range(read, len(cloud.files)):
        report = lambda rows, _, done=done: callback(done + rows, len(cloud))
        part = cloud.partial(x, alpha, sigma, files=[i], callback=report)
        total, done = merge([total, part]), done + cloud._files.sizes[i]
        if time.monotonic() - last >= SECONDS and i + 1 < len(cloud.files):
            work.keep_step(i + 1, total._moments())
            last = time.monotonic()
    return total
