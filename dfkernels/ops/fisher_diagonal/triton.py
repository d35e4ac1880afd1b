# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""fisher_diagonal on CUDA: the moments of `posterior`, with second moments coordinate by
coordinate."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.triton import fused
from ..common.triton.device import device_of
from ..common.triton.launch import (
    SplitMoments,
    accumulate,
    in_query_groups,
    merge_grid,
    merged_weights,
)
from ..common.triton.merge import merge_squares_kernel
from ..common.triton.problem import Lists, Problem


def _merge(p: Problem, moments: SplitMoments, fisher: bool, mean: Tensor | None, out: Tensor):
    """Writes diag F, or diag C, and the mean."""
    B, d = p.x.shape
    grid, sizes = merge_grid(B, d, device_of(p.x))
    merge_squares_kernel[grid](
        scalars=moments.scalars,
        vectors=moments.vectors,
        alpha=p.alpha if fisher else None,
        sigma=p.sigma if fisher else None,
        common=None,
        mean=mean,
        out=out,
        log_prob=None,
        ess=None,
        targets=B,
        d=d,
        splits=moments.splits,
        atoms=moments.prior_count,
        DIAGONAL=True,
        **sizes,
    )


def _launch(p: Problem) -> Tensor:
    out = torch.empty_like(p.x)
    _merge(p, accumulate(p), True, None, out)
    return out


def _of_pass(one: fused.Prepared) -> Tensor:
    out = torch.empty_like(one.problem.x)
    _merge(one.problem, fused.accumulate(one), True, None, out)
    return out


def about_mean(p: Problem) -> tuple[Tensor, ...]:
    """What `moments_about_mean` returns for the kind."""
    moments = accumulate(p)
    mean, variance = (torch.empty_like(p.x, dtype=torch.float64) for _ in range(2))
    _merge(p, moments, False, mean, variance)
    shift, weight_square = merged_weights(moments)
    reference = mean.to(p.x.dtype)
    first = mean - reference
    return shift, reference, first, variance + first.square(), weight_square


def launch(x, y, alpha, sigma, log_prior, scale, offset, atoms=None, counts=None):
    """The op for flat tensors on one GPU."""
    if x.shape[0] == 0:
        return x.new_empty(x.shape)
    given = (x, y, None, alpha, sigma, log_prior, scale, offset)
    plan = fused.plan_for(x, y, None, "diagonal", atoms)
    if plan is not None:
        return fused.in_one_pass(_of_pass, plan, *given)
    return in_query_groups(_launch, *given, lists=Lists.of(atoms, counts))
