# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""average on CUDA: the weights of all atoms, some queries at a time, then sums of their values; of
lists the weights of all their atoms at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common import segments
from ..common.triton.density import density, log_density, scratch, weights
from ..common.triton.launch import SCRATCH, in_query_groups
from ..common.triton.logits import by_differences
from ..common.triton.pair import sums_over_atoms
from ..common.triton.problem import Lists, Problem, make_problem, stored_atoms


def _launch(p: Problem, values: Tensor) -> tuple[Tensor, Tensor]:
    found = density(p, keep=True)
    if values.shape[1] == 0:
        return log_density(p, found.log_sum), p.x.new_empty(len(p.x), 0)
    e = weights(p, found)
    payload = p._replace(y=values, scale=1.0, offset=0.0)
    total = e.sum(1, dtype=torch.float64)[:, None]
    average = sums_over_atoms(payload, None, e)[0] / total
    return log_density(p, found.log_sum), average.to(p.x.dtype)


def _listed(p: Problem, values: Tensor) -> tuple[Tensor, Tensor]:
    """What a value holds where its weight is negligible is not seen."""
    atoms, lengths, pairs = p.lists.atoms, p.lists.first.diff(), len(p.lists.atoms)
    logit = by_differences(p).double() * math.log(2)
    total = segments.logsumexp(logit, lengths)
    w = (logit - segments.spread(total, lengths, pairs)).exp_()
    w.masked_fill_(w < 2**-p.gap, 0)
    out = p.x.new_empty(len(p.x), values.shape[1])
    step = max(1, SCRATCH // (4 * pairs))
    for k in range(0, values.shape[1], step):
        some = torch.where(w[:, None] == 0, 0, values[atoms, k : k + step])
        out[:, k : k + step] = segments.sums(w[:, None] * some, lengths)
    log_sum = total + p.queries.common - (math.log(len(p.y)) if p.log_pi is None else 0)
    return log_density(p, log_sum), out


def launch(x, y, values, alpha, sigma, log_prior, scale, offset, atoms=None, counts=None):
    """The op for flat tensors on one GPU."""
    B, N, P = x.shape[0], y.shape[0], values.shape[1]
    if B == 0:
        return x.new_empty(0), x.new_empty(0, P)
    given = (x, y, None, alpha, sigma, log_prior, scale, offset)
    if atoms is not None:
        with torch.cuda.device_of(x):
            return _listed(make_problem(*given, lists=Lists.of(atoms, counts)), values)
    values, _, _ = stored_atoms(x, values, 1.0, 0.0)
    room = scratch(x, N, keep=True) + N + 64 * P
    return in_query_groups(lambda p: _launch(p, values), *given, scratch=room)
