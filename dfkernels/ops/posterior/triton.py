# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""posterior on CUDA: the moments, their merge, and the trace from the merge's parts."""

from __future__ import annotations

import torch
import triton
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
from ..common.triton.merge import finish_trace_kernel, merge_squares_kernel
from ..common.triton.problem import Lists, Problem


def _launch(p: Problem) -> tuple[Tensor, ...]:
    return _results(p, accumulate(p, trace_only=True))


def _of_pass(one: fused.Prepared) -> tuple[Tensor, ...]:
    return _results(one.problem, fused.accumulate(one))


def _results(p: Problem, moments: SplitMoments) -> tuple[Tensor, ...]:
    """log_prob, mean, trace, ess."""
    B, d = p.x.shape
    grid, sizes = merge_grid(B, d, device_of(p.x))
    blocks = triton.cdiv(d, sizes["D"])
    log_prob, trace, ess = (p.x.new_empty(B) for _ in range(3))
    mean = p.x.new_empty(B, d)
    parts = p.x.new_empty(B, blocks, dtype=torch.float64)
    merge_squares_kernel[grid](
        scalars=moments.scalars,
        vectors=moments.vectors,
        alpha=p.alpha,
        sigma=p.sigma,
        common=moments.common,
        mean=mean,
        out=parts,
        log_prob=log_prob,
        ess=ess,
        targets=B,
        d=d,
        splits=moments.splits,
        atoms=moments.prior_count,
        DIAGONAL=False,
        **sizes,
    )
    finish_trace_kernel[(B,)](
        parts=parts,
        alpha=p.alpha,
        sigma=p.sigma,
        trace=trace,
        d=d,
        blocks=blocks,
        BLOCKS=32,
        num_warps=1,
    )
    return log_prob, mean, trace, ess


def launch(x, y, alpha, sigma, log_prior, scale, offset, atoms=None, counts=None):
    """The op for flat tensors on one GPU."""
    if x.shape[0] == 0:
        return x.new_empty(0), x.new_empty(x.shape), x.new_empty(0), x.new_empty(0)
    given = (x, y, None, alpha, sigma, log_prior, scale, offset)
    plan = fused.plan_for(x, y, None, "posterior", atoms)
    if plan is not None:
        return fused.in_one_pass(_of_pass, plan, *given)
    return in_query_groups(_launch, *given, lists=Lists.of(atoms, counts))


def about_mean(p: Problem) -> tuple[Tensor, ...]:
    """What `moments_about_mean` returns for the kind."""
    B, d = p.x.shape
    moments = accumulate(p, trace_only=True)
    grid, sizes = merge_grid(B, d, device_of(p.x))
    mean = p.x.new_empty(B, d, dtype=torch.float64)
    parts = mean.new_empty(B, triton.cdiv(d, sizes["D"]))
    merge_squares_kernel[grid](
        scalars=moments.scalars,
        vectors=moments.vectors,
        alpha=None,
        sigma=None,
        common=None,
        mean=mean,
        out=parts,
        log_prob=None,
        ess=None,
        targets=B,
        d=d,
        splits=moments.splits,
        atoms=moments.prior_count,
        DIAGONAL=False,
        **sizes,
    )
    shift, weight_square = merged_weights(moments)
    reference = mean.to(p.x.dtype)
    first = mean - reference
    return shift, reference, first, parts.sum(1) + first.square().sum(1), weight_square
