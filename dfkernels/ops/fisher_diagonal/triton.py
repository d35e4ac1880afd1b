"""fisher_diagonal on CUDA: the sums of `posterior`, merged coordinate by coordinate."""

from __future__ import annotations

import torch
import triton

from .._triton_gather import gather
from .._triton_merge import merge_squares


def launch(x, y, alpha, sigma, log_prior, scale, offset):
    B, d = x.shape
    out = x.new_empty(B, d)
    if B == 0:
        return out
    alpha, sigma = alpha.contiguous(), sigma.contiguous()
    with torch.cuda.device_of(x):
        sums = gather(x, y, None, alpha, sigma, log_prior, scale, offset)
        D = min(triton.next_power_of_2(d), 128)
        merge_squares[(B * triton.cdiv(d, D),)](
            sums.scalars,
            sums.vectors,
            alpha,
            sigma,
            out,  # mean, log_prob and ess are not written
            out,
            out,
            out,
            B,
            d,
            sums.splits,
            0.0,
            DIAGONAL=True,
            SPLITS=16,
            D=D,
        )
    return out
