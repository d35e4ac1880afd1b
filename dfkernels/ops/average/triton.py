# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""average on CUDA: the weights of all atoms, some queries at a time, then sums of their values."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.triton.density import density, log_density, scratch, weights
from ..common.triton.launch import in_query_groups
from ..common.triton.pair import sums_over_atoms
from ..common.triton.problem import Problem, stored_atoms


def _launch(p: Problem, values: Tensor) -> tuple[Tensor, Tensor]:
    found = density(p, keep=True)
    if values.shape[1] == 0:
        return log_density(p, found.log_sum), p.x.new_empty(len(p.x), 0)
    e = weights(p, found)
    payload = p._replace(y=values, scale=1.0, offset=0.0)
    total = e.sum(1, dtype=torch.float64)[:, None]
    average = sums_over_atoms(payload, None, e)[0] / total
    return log_density(p, found.log_sum), average.to(p.x.dtype)


def launch(x, y, values, alpha, sigma, log_prior, scale, offset):
    """The op for flat tensors on one GPU."""
    B, N, P = x.shape[0], y.shape[0], values.shape[1]
    if B == 0:
        return x.new_empty(0), x.new_empty(0, P)
    values, _, _ = stored_atoms(x, values, 1.0, 0.0)
    given = (x, y, None, alpha, sigma, log_prior, scale, offset)
    room = scratch(x, N, keep=True) + N + 64 * P
    return in_query_groups(lambda p: _launch(p, values), *given, scratch=room)
