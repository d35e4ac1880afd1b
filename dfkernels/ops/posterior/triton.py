"""posterior on CUDA: the sweep, its merge, and the trace from the merge's parts."""

from __future__ import annotations

import torch
import triton

from ..common.triton.launch import gather, in_blocks, merge_grid
from ..common.triton.merge import finish_trace, merge_squares


def _launch(p):
    B, d = p.x.shape
    sums = gather(p, spread=True)
    grid, sizes = merge_grid(B, d)
    blocks = triton.cdiv(d, sizes["D"])
    log_prob, mean, trace, ess = (
        p.x.new_empty(B),
        p.x.new_empty(B, d),
        p.x.new_empty(B),
        p.x.new_empty(B),
    )
    parts = p.x.new_empty(B, blocks, dtype=torch.float64)
    merge_squares[grid](
        *(sums.scalars, sums.vectors, p.alpha, p.sigma, mean, parts, log_prob, ess),
        *(B, d, sums.splits, sums.atoms),
        DIAGONAL=False,
        **sizes,
    )
    finish_trace[(B,)](parts, p.alpha, p.sigma, trace, d, blocks, BLOCKS=32, num_warps=1)
    return log_prob, mean, trace, ess


def launch(x, y, alpha, sigma, log_prior, scale, offset):
    """As the op."""
    if x.shape[0] == 0:
        return x.new_empty(0), x.new_empty(x.shape), x.new_empty(0), x.new_empty(0)
    return in_blocks(_launch, x, y, None, alpha, sigma, log_prior, scale, offset)
