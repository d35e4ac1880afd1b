# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""log_prob on CUDA: the sum of the exponentials of the logits, no moments; with lists of atoms, the
weights of `posterior`'s moments."""

from __future__ import annotations

from torch import Tensor

from ..common.triton import fused
from ..common.triton.density import density, log_density, scratch
from ..common.triton.launch import SplitMoments, accumulate, in_query_groups
from ..common.triton.merge import merge_log_prob_kernel
from ..common.triton.problem import Lists, Problem


def _launch(p: Problem) -> Tensor:
    if p.lists is not None:
        return _merged(p, accumulate(p, trace_only=True))
    return log_density(p, density(p, keep=False).log_sum)


def _of_pass(one: fused.Prepared) -> Tensor:
    return _merged(one.problem, fused.accumulate(one))


def _merged(p: Problem, moments: SplitMoments) -> Tensor:
    """log_prob from the sums of weights of all splits."""
    B, d = p.x.shape
    out = p.x.new_empty(B)
    merge_log_prob_kernel[(B,)](
        scalars=moments.scalars,
        sigma=p.sigma,
        common=moments.common,
        log_prob=out,
        targets=B,
        d=d,
        splits=moments.splits,
        atoms=moments.prior_count,
        SPLITS=128,
        num_warps=1,
    )
    return out


def launch(x, y, alpha, sigma, log_prior, scale, offset, atoms=None, counts=None):
    """The op for flat tensors on one GPU."""
    if x.shape[0] == 0:
        return x.new_empty(0)
    given = (x, y, None, alpha, sigma, log_prior, scale, offset)
    plan = fused.plan_for(x, y, None, "log_prob", atoms)
    if plan is not None:
        return fused.in_one_pass(_of_pass, plan, *given)
    room = scratch(x, y.shape[0], keep=False)
    return in_query_groups(_launch, *given, scratch=room, lists=Lists.of(atoms, counts))
