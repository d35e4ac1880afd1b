# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""fisher_matvec and covariance_matvec on CUDA; a target is a query with one of its vectors.

Where logits are given to the sweep, the mean comes first and the moments are taken about it.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..common.triton.device import device_of
from ..common.triton.launch import accumulate, in_query_groups, merge_grid, merged_mean, tile_for
from ..common.triton.logits import compute_logits, compute_projections
from ..common.triton.merge import merge_matvec_kernel, reference_projections_kernel
from ..common.triton.problem import Problem


def _launch(p: Problem, fisher: bool) -> Tensor:
    targets, (B, d) = p.targets, p.x.shape
    if tile_for(targets, d, p.x.element_size(), device_of(p.x)).logits_given:
        logits = compute_logits(p)
        moments = accumulate(p._replace(v=None), logits, trace_only=True)
        mean = merged_mean(moments, B, d).repeat_interleave(targets // B, 0)
        reference = mean.to(p.x.dtype)
        projections = compute_projections(p, logits, reference)
        moments = accumulate(p, logits, projections, reference)
    else:
        moments = accumulate(p)
        mean = merged_mean(moments, targets, d)
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
    out = torch.empty_like(p.v)
    grid, sizes = merge_grid(targets, d)
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
    return out


def launch(x, y, v, alpha, sigma, log_prior, scale, offset, *, fisher: bool):
    """F v, or C v where not fisher, for flat tensors on one GPU."""
    if v.numel() == 0:
        return v.new_empty(v.shape)
    run = lambda p: _launch(p, fisher)
    return in_query_groups(run, x, y, v, alpha, sigma, log_prior, scale, offset)
