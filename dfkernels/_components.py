"""The weights of a mixture's components, one by one: which are heaviest, and draws among them.

In float64 and tile by tile, so that the memory does not grow with queries times components.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .ops.common.moments import load
from .ops.draw.gumbel import gumbel

__all__ = ["Components", "drawn", "k_heaviest"]

_NUMBERS = 1 << 22  # of the differences of a tile


class Components(NamedTuple):
    """N Gaussians on the axes of their covariances: means scale * y + offset, y [N, d], variances
    [1 or N, 1 or d], log weights [N].
    """

    y: Tensor
    variance: Tensor
    log_pi: Tensor
    scale: float
    offset: float

    def tiles(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first component, logits [B, n]) of one tile after the other, for x [B, d]: log pi_i +
        log N(x; alpha y_i, sigma^2 + alpha^2 v_i).
        """
        x, a, s = (t.double() for t in (x, alpha[:, None, None], sigma[:, None, None]))
        step = max(1, _NUMBERS // max(1, x.numel()))
        for start in range(0, len(self.y), step):
            part = slice(start, start + step)
            y = load(self.y[part], torch.float64, self.scale, self.offset)
            variance = self.variance if len(self.variance) == 1 else self.variance[part]
            tau2 = s**2 + a**2 * variance.double()
            square = (x[:, None] - a * y) ** 2 / tau2 + torch.log(2 * math.pi * tau2)
            logits = self.log_pi[part] - 0.5 * square.sum(-1)
            masked = self.log_pi[part] == -math.inf  # whatever such a component holds
            yield start, torch.where(masked, -math.inf, logits)


def k_heaviest(
    components: Components, x: Tensor, alpha: Tensor, sigma: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k heaviest components, heaviest first, of equal ones the earlier first, and their log
    weights, [B, k]: x [B, d], levels [B].
    """
    total = x.new_full((len(x),), -math.inf, dtype=torch.float64)
    index = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
    logit = x.new_empty(len(x), 0, dtype=torch.float64)
    for start, found in components.tiles(x, alpha, sigma):
        total = torch.logaddexp(total, found.logsumexp(1))
        number = torch.arange(
            start, start + found.shape[1], dtype=torch.int64, device=x.device
        ).expand(len(x), -1)
        logit, index = torch.cat([logit, found], 1), torch.cat([index, number], 1)
        order = logit.sort(dim=1, descending=True, stable=True).indices[:, :k]
        logit, index = logit.gather(1, order), index.gather(1, order)
    return index, logit - total[:, None]


def drawn(components: Components, x: Tensor, alpha: Tensor, sigma: Tensor, seed: int) -> Tensor:
    """The number of one component per query, [B], drawn by the posterior weights: the largest of
    the logits with Gumbel noise, which depends on seed, query and component alone.
    """
    best = x.new_full((len(x),), -math.inf, dtype=torch.float64)
    index = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    queries = torch.arange(len(x), dtype=torch.int64, device=x.device)[:, None]
    for start, logits in components.tiles(x, alpha, sigma):
        number = torch.arange(start, start + logits.shape[1], dtype=torch.int64, device=x.device)
        noisy = logits + gumbel(seed, queries, number, 1)
        largest, place = noisy.max(1)
        index = torch.where(largest > best, start + place, index)
        best = torch.maximum(best, largest)
    return index
