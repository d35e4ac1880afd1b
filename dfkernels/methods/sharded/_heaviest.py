"""The heaviest atoms of all files, in one pass over them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...cloud import PointCloud
from ._certified import Found, chunks
from ._pass import Pass

__all__ = ["Atoms", "k_heaviest", "of_all", "of_found"]


class Atoms(NamedTuple):
    """Some atoms of a cloud, and which queries look at them."""

    cloud: PointCloud
    numbers: Tensor  # int64 [n]: where they stand in all files, rising
    queries: Tensor  # int64


def of_all(over: Pass, x: Tensor) -> Iterator[Atoms]:
    """All atoms, for all queries x."""
    queries = torch.arange(len(x), dtype=torch.int64, device="cpu")
    for block, y in over.files.blocks(over.numbers, over.count, over.pinned):
        y, scale, offset = over.stored(y, x)
        start = over.files.starts[block.file]
        numbers = torch.arange(block.first, block.last, dtype=torch.int64, device="cpu") + start
        yield Atoms(PointCloud(y, scale=scale, offset=offset), numbers, queries)


def of_found(over: Pass, x: Tensor, found: Found) -> Iterator[Atoms]:
    """The atoms that a search has found."""
    for i in over.numbers:
        for chunk in chunks(found, i, over.count):
            y, scale, offset = over.stored(over.files.gather(i, chunk.atoms), x)
            cloud = PointCloud(y, scale=scale, offset=offset)
            yield Atoms(cloud, chunk.atoms + over.files.starts[i], chunk.queries)


def k_heaviest(
    x: Tensor, alpha: Tensor, sigma: Tensor, parts: Iterable[Atoms], k: int
) -> tuple[Tensor, Tensor]:
    """As `Law._k_heaviest`, of all parts together, which have disjoint pairs of a query and an
    atom, and at least k atoms for each query. A part's memory may be used again for the next.
    """
    logit = torch.full((len(x), k), -math.inf, dtype=torch.float64, device=x.device)
    index = torch.full(logit.shape, -1, dtype=torch.int64, device=x.device)
    total = torch.full_like(logit[:, 0], -math.inf)
    for cloud, numbers, q in parts:
        numbers, q, log_n = numbers.to(x.device), q.to(x.device), math.log(len(cloud))
        found = cloud._heaviest(x[q], alpha[q], sigma[q], min(k, len(cloud)))
        rows = torch.cat([index[q], numbers[found.index]], 1)
        values = torch.cat([logit[q], found.logit + log_n], 1)
        rows, order = rows.sort(dim=1, stable=True)  # of equally heavy ones the earlier first
        values, best = values.gather(1, order).sort(dim=1, descending=True, stable=True)
        logit[q], index[q] = values[:, :k], rows.gather(1, best)[:, :k]
        total[q] = torch.logaddexp(total[q], found.log_total + log_n)
    return index, logit - total[:, None]
