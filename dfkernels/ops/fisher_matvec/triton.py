# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""fisher_matvec and covariance_matvec on CUDA; a target is a query with one of its vectors.

Where logits are given to the sweep, the mean comes first and the moments are taken about it.
"""

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
    merged_mean,
    merged_weights,
    tile_of,
)
from ..common.triton.logits import compute_logits, compute_projections
from ..common.triton.merge import merge_matvec_kernel, reference_projections_kernel
from ..common.triton.problem import Lists, Problem
from ..posterior import triton as posterior


def _product(p: Problem, fisher: bool, out: Tensor) -> tuple[SplitMoments, Tensor]:
    """Writes F v, or C v. Returns moments of the targets, or of the queries, and the targets' means
    in double."""
    targets, (B, d) = p.targets, p.x.shape
    if tile_of(p).logits_given:
        logits = compute_logits(p)
        weights = moments = accumulate(p._replace(v=None), logits, trace_only=True)
        mean = merged_mean(moments, B, d).repeat_interleave(targets // B, 0)
        reference = mean.to(p.x.dtype)
        projections = compute_projections(p, logits, reference)
        moments = accumulate(p, logits, projections, reference)
    else:
        weights = moments = accumulate(p)
        mean = merged_mean(moments, targets, d)
    _finish(p, moments, mean, fisher, out)
    return weights, mean


def _finish(p: Problem, moments: SplitMoments, mean: Tensor, fisher: bool, out: Tensor) -> None:
    """Writes F v, or C v, from the moments of the targets and their means."""
    targets, (B, d) = p.targets, p.x.shape
    reference_projections = mean.new_empty(moments.splits, targets)
    reference_projections_kernel[(moments.splits * targets,)](
        scalars=moments.scalars,
        vectors=moments.vectors,
        mean=mean,
        v=p.v,
        out=reference_projections,
        targets=targets,
        d=d,
        D=min(triton.next_power_of_2(d), 1024),
    )
    grid, sizes = merge_grid(targets, d, device_of(p.x))
    merge_matvec_kernel[grid](
        scalars=moments.scalars,
        vectors=moments.vectors,
        mean=mean,
        reference_projections=reference_projections,
        v=p.v,
        alpha=p.alpha,
        sigma=p.sigma,
        out=out,
        targets=targets,
        vectors_per_query=targets // B,
        d=d,
        splits=moments.splits,
        FISHER=fisher,
        **sizes,
    )


def _launch(p: Problem, fisher: bool) -> Tensor:
    """C v alone takes the moments about the mean, F v, of which the identity is a part, need
    not."""
    out = torch.empty_like(p.v)
    _product(p, fisher, out)
    return out


def _of_pass(one: fused.Prepared) -> Tensor:
    p, moments = one.problem, fused.accumulate(one)
    out = torch.empty_like(p.v)
    _finish(p, moments, merged_mean(moments, p.targets, p.x.shape[1]), True, out)
    return out


def about_mean(p: Problem) -> tuple[Tensor, ...]:
    """What `moments_about_mean` returns for the kind."""
    B, K, d = p.v.shape
    if K == 0:
        shift, reference, first, _, weight_square = posterior.about_mean(p._replace(v=None))
        return shift, reference, first, torch.zeros_like(p.v), weight_square
    second = torch.empty_like(p.v, dtype=torch.float64)
    moments, mean = _product(p, False, second)
    shift, weight_square = (t.view(B, -1)[:, 0] for t in merged_weights(moments))
    mean = mean.view(B, K, d)[:, 0]
    reference = mean.to(p.x.dtype)
    first = (mean - reference)[:, None]
    second += first * (first * p.v).sum(-1, keepdim=True)
    return shift, reference, first[:, 0], second, weight_square


def launch(
    x, y, v, alpha, sigma, log_prior, scale, offset, atoms=None, counts=None, *, fisher: bool
):
    """F v, or C v where not fisher, for flat tensors on one GPU."""
    if v.numel() == 0:
        return v.new_empty(v.shape)
    given = (x, y, v, alpha, sigma, log_prior, scale, offset)
    plan = fused.plan_for(x, y, v, "matvec", atoms) if fisher else None
    if plan is not None:
        return fused.in_one_pass(_of_pass, plan, *given)
    run = lambda p: _launch(p, fisher)
    return in_query_groups(run, *given, lists=Lists.of(atoms, counts))
