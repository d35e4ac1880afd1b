"""The heaviest atoms of all files, and draws from all of them, in one pass over the files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..._constants import DRAW_BLOCK
from ...certified import heaviest
from ...certified.heaviest import Heaviest
from ...cloud import PointCloud
from ...ops.draw.gumbel import gumbel

__all__ = ["Rows", "draw", "k_heaviest"]

_PAIRS = 1 << 20  # of a query and an atom whose logits are computed together
_ACCURACY = 1e-7  # of the logits that matter for a draw: less than a float32 kernel's
_NOTHING = 60.0  # an atom so many nats below the heaviest is never drawn


class Rows(NamedTuple):
    """Atoms of a cloud, the queries that may count them, and where they stand in all files."""

    cloud: PointCloud
    numbers: Tensor  # int64 [n], rising
    queries: Tensor  # int64 [Q]


def k_heaviest(
    x: Tensor, alpha: Tensor, sigma: Tensor, parts: Iterable[Rows], k: int
) -> tuple[Tensor, Tensor]:
    """The numbers of the k atoms with the largest posterior weights, heaviest first, of equal ones
    the earlier, and their log weights in float64, each [B, k].

    Args:
        x, alpha, sigma: queries and their levels, [B].
        parts: all atoms that may be among them, or whose weight counts.
        k: from 1 to the number of atoms.
    """
    logit = torch.full((len(x), k), -math.inf, dtype=torch.float64, device=x.device)
    index = torch.full(logit.shape, -1, dtype=torch.int64, device=x.device)
    total = logit[:, 0].clone()
    for cloud, numbers, q in parts:
        n = len(cloud)
        found = cloud._heaviest(x[q], alpha[q], sigma[q], min(k, n))
        here = Heaviest(numbers.to(x.device)[found.index], found.logit + math.log(n),
                        found.log_total + math.log(n))
        rows, order = torch.cat([index[q], here.index], 1).sort(dim=1, stable=True)
        values = torch.cat([logit[q], here.logit], 1).gather(1, order)
        values, order = values.sort(dim=1, descending=True, stable=True)
        logit[q], index[q] = values[:, :k], rows.gather(1, order)[:, :k]
        total[q] = torch.logaddexp(total[q], here.log_total)
    return index, logit - total[:, None]


def draw(
    x: Tensor, alpha: Tensor, sigma: Tensor, parts: Iterable[tuple[int, Tensor, float, float]], seed: int
) -> Tensor:
    """..."""
