# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""log_prob on CUDA: the sum of the exponentials of the logits, no moments; with lists of atoms, the
weights of `posterior`'s moments."""

from __future__ import annotations

from torch import Tensor

from ..common.triton import fused
from ..common.triton.density import density, log_density, scratch
from ..common.triton.launch import accumulate, in_query_groups, merged_weights
from ..common.triton.problem import Lists, Problem


def _launch(p: Problem) -> Tensor:
    if p.lists is not None:
        return log_density(p, merged_weights(accumulate(p, trace_only=True))[0])
    one = fused.prepared(p, "log_prob")
    if one is None:
        return log_density(p, density(p, keep=False).log_sum)
    log_sum, _ = merged_weights(fused.accumulate(one))
    return log_density(one.problem, log_sum)[one.back]


def launch(x, y, alpha, sigma, log_prior, scale, offset, atoms=None, counts=None):
    """The op for flat tensors on one GPU."""
    if x.shape[0] == 0:
        return x.new_empty(0)
    room = fused.room(x, y, None, "log_prob") or scratch(x, y.shape[0], keep=False)
    given = (x, y, None, alpha, sigma, log_prior, scale, offset)
    return in_query_groups(_launch, *given, scratch=room, lists=Lists.of(atoms, counts))
