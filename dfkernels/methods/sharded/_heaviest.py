"""The heaviest atoms of all files, in one pass over them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...certified import heaviest
from ...ops.common.about_mean import log_norm
from ...partial import Partial
from ._certified import Found, chunks
from ._pass import Pass

__all__ = ["Atoms", "k_heaviest", "of_all", "of_found"]


class Atoms(NamedTuple):
    """Some atoms of a cloud, and which queries look at them."""

    y: Tensor  # rows [n, *E], as they are stored
    numbers: Tensor  # int64 [n]: where they stand in all files, rising
    queries: Tensor  # int64


def of_all(over: Pass, x: Tensor) -> Iterator[Atoms]:
    """All atoms, for all queries x."""
    queries = torch.arange(len(x), dtype=torch.int64, device="cpu")
    for block, y in over.files.blocks(over.numbers, over.count, over.pinned):
        start = over.files.starts[block.file]
        numbers = torch.arange(block.first, block.last, dtype=torch.int64, device="cpu") + start
        yield Atoms(y, numbers, queries)


def of_found(over: Pass, found: Found) -> Iterator[Atoms]:
    """The atoms that a search has found."""
    for i in over.numbers:
        for chunk in chunks(found, i, over.count):
            y = over.files.gather(i, chunk.atoms)
            yield Atoms(y, chunk.atoms + over.files.starts[i], chunk.queries)


def k_heaviest(
    over: Pass, x: Tensor, alpha: Tensor, sigma: Tensor, parts: Iterable[Atoms], k: int
) -> tuple[Tensor, Tensor]:
    """As `Law._k_heaviest`, of all parts together, which have disjoint pairs of a query and an
    atom, and at least k atoms for each query. A part's memory may be used again for the next.
    """
    logit = torch.full((len(x), k), -math.inf, dtype=torch.float64, device=x.device)
    index = torch.full(logit.shape, -1, dtype=torch.int64, device=x.device)
    total = torch.full_like(logit[:, 0], -math.inf)
    for part in parts:
        numbers, q = part.numbers.to(x.device), part.queries.to(x.device)
        found = _of_part(over, part.y, x[q], alpha[q], sigma[q], min(k, len(numbers)))
        rows = torch.cat([index[q], numbers[found.index]], 1)
        values = torch.cat([logit[q], found.logit], 1)
        rows, order = rows.sort(dim=1, stable=True)  # of equally heavy ones the earlier first
        values, best = values.gather(1, order).sort(dim=1, descending=True, stable=True)
        logit[q], index[q] = values[:, :k], rows.gather(1, best)[:, :k]
        total[q] = torch.logaddexp(total[q], found.log_total)
    return index, logit - total[:, None]


def _of_part(
    over: Pass, y: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, k: int
) -> heaviest.Heaviest:
    x, atoms = x.flatten(1), over.atoms(y, x)
    wide = x.double(), alpha.double(), sigma.double()

    def log_total() -> Tensor:
        how = {"scale": atoms.scale, "offset": atoms.offset}
        mass = Partial.of(x, atoms.y, alpha, sigma, **how).log_mass
        return mass + log_norm(wide[2], x.shape[1])

    search = (*wide, atoms, heaviest.distances(atoms), k)
    return heaviest.heaviest_for(x.dtype, *search, log_total)
