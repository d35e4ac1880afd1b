# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""fisher_diagonal on CUDA: the moments of `posterior`, merged coordinate by coordinate."""

from __future__ import annotations

from torch import Tensor

from ..common.triton.launch import accumulate, in_query_groups, merge_grid
from ..common.triton.merge import merge_squares_kernel
from ..common.triton.problem import Problem


def _launch(p: Problem) -> Tensor:
    B, d = p.x.shape
    moments = accumulate(p)
    out = p.x.new_empty(B, d)
    grid, sizes = merge_grid(B, d)
    merge_squares_kernel[grid](
        scalars=moments.scalars,
        vectors=moments.vectors,
        alpha=p.alpha,
        sigma=p.sigma,
        mean=None,
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
    return out


def launch(x, y, alpha, sigma, log_prior, scale, offset):
    """The op for flat tensors on one GPU."""
    if x.shape[0] == 0:
        return x.new_empty(x.shape)
    return in_query_groups(_launch, x, y, None, alpha, sigma, log_prior, scale, offset)
