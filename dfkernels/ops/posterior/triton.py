"""posterior on CUDA: the sweep, its merge, and the trace from the merge's parts."""

from __future__ import annotations

import torch
import triton

from .._triton_gather import gather
from .._triton_merge import finish_trace, merge_squares


def launch(x, y, alpha, sigma, log_prior, scale, offset):
    B, d = x.shape
    log_prob, mean, trace, ess = x.new_empty(B), x.new_empty(B, d), x.new_empty(B), x.new_empty(B)
    if B == 0:
        return log_prob, mean, trace, ess
    alpha, sigma = alpha.contiguous(), sigma.contiguous()
    with torch.cuda.device_of(x):
        sums = gather(x, y, None, alpha, sigma, log_prior, scale, offset)
        D = min(triton.next_power_of_2(d), 128)
        blocks = triton.cdiv(d, D)
        parts = x.new_empty(B, blocks, dtype=torch.float64)
        merge_squares[(B * blocks,)](
            sums.scalars,
            sums.vectors,
            alpha,
            sigma,
            mean,
            parts,
            log_prob,
            ess,
            B,
            d,
            sums.splits,
            sums.log_total,
            DIAGONAL=False,
            SPLITS=16,
            D=D,
        )
        finish_trace[(B,)](parts, alpha, sigma, trace, d, blocks, BLOCKS=32, num_warps=1)
    return log_prob, mean, trace, ess
