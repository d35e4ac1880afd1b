"""fisher_matvec and covariance_matvec on CUDA: a lane per vector; the mean first, then sums about it."""

from __future__ import annotations

import torch
import triton

from .._triton_gather import gather
from .._triton_merge import merge_matvec, merge_mean, moved_dots


def launch(x, y, v, alpha, sigma, log_prior, scale, offset, *, fisher):
    B, K, d = v.shape
    out = v.new_empty(v.shape)
    if v.numel() == 0:
        return out
    v, alpha, sigma = v.contiguous(), alpha.contiguous(), sigma.contiguous()
    with torch.cuda.device_of(x):
        sums = gather(x, y, v, alpha, sigma, log_prior, scale, offset)
        D = min(triton.next_power_of_2(d), 128)
        grid = (B * K * triton.cdiv(d, D),)
        mean = x.new_empty(B * K, d, dtype=torch.float64)
        dots = x.new_empty(sums.splits, B * K, dtype=torch.float64)
        merge_mean[grid](sums.scalars, sums.vectors, mean, B * K, d, sums.splits, SPLITS=16, D=D)
        moved_dots[(sums.splits * B * K,)](sums.vectors, mean, v, dots, B * K, d, D=min(triton.next_power_of_2(d), 1024))
        merge_matvec[grid](
            sums.scalars,
            sums.vectors,
            mean,
            dots,
            v,
            alpha,
            sigma,
            out,
            B * K,
            K,
            d,
            sums.splits,
            FISHER=fisher,
            SPLITS=16,
            D=D,
        )
    return out
