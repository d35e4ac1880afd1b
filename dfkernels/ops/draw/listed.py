"""Draws with lists of atoms in PyTorch: only listed rows are read, and all queries go together."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._constants import DRAW_BLOCK as BLOCK
from ..._torch.errors import UnusableValue
from ..common import derivatives, lists, moments, segments
from .gumbel import gumbel


def draw_listed(
    x: Tensor,
    y: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    log_pi: Tensor,
    scale: float,
    offset: float,
    seed: int,
    queries: Tensor,
    atoms: Tensor,
    counts: Tensor,
) -> Tensor:
    """The op's flat arguments, with log_pi normalised; queries: their numbers, [B]."""
    if not len(x):
        return atoms.new_empty(0)
    lists.split(atoms, counts, len(y))
    each = torch.arange(len(x), dtype=torch.int64, device=x.device)
    query = segments.spread(each, counts, len(atoms))
    pairs = (x, y, alpha, sigma, log_pi, scale, offset)
    step = max(1, derivatives.TILE // y.shape[1])
    some = zip(query.split(step), atoms.split(step), strict=True)
    logit = torch.cat([_logits(*pairs, q, a) for q, a in some])
    if x.device.type == "cpu" and not bool(segments.logsumexp(logit, counts).isfinite().all()):
        raise UnusableValue("x: expected distances to the atoms that can be represented, got none")
    # a query's atoms of one block of rows lie side by side
    blocks = query * (len(y) // BLOCK + 1) + atoms // BLOCK
    lengths = blocks.unique_consecutive(return_counts=True)[1]
    begin = lengths.cumsum(0) - lengths
    of_query, number = query[begin], atoms[begin] // BLOCK
    score = segments.logsumexp(logit, lengths) + gumbel(seed, queries[of_query], number, 0)
    first = segments.first_largest(score, of_query.unique_consecutive(return_counts=True)[1])
    chosen = torch.zeros_like(number, dtype=torch.bool).index_fill(0, first, True)
    place = segments.spread(chosen, lengths, len(atoms)).nonzero()[:, 0]
    score = logit[place] + gumbel(seed, queries[query[place]], atoms[place], 1)
    return atoms[place[segments.first_largest(score, lengths[first])]]


def _logits(x, y, alpha, sigma, log_pi, scale, offset, query, atom) -> Tensor:
    """Of pairs (query[m], atom[m]), in float64."""
    values = moments.load(y[atom], x.dtype, scale, offset)[:, None]
    prior = log_pi[atom][:, None]
    return moments.logits(x[query], values, alpha[query], sigma[query], prior)[:, 0].double()
