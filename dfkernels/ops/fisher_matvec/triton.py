"""fisher_matvec and covariance_matvec on CUDA: a lane per vector; the mean first, then sums about
it."""

from __future__ import annotations

import torch
import triton

from ..common.triton.device import device_of
from ..common.triton.launch import gather, in_blocks, merge_grid, tile_for
from ..common.triton.logits import logits, tilts
from ..common.triton.merge import merge_matvec, merge_mean, moved_dots


def _mean(p, sums):
    """[lanes, d] in double."""
    lanes, d = p.lanes, p.x.shape[1]
    mean = p.x.new_empty(lanes, d, dtype=torch.float64)
    grid, sizes = merge_grid(lanes, d)
    merge_mean[grid](sums.scalars, sums.vectors, mean, lanes, d, sums.splits, **sizes)
    return mean


def _launch(p, fisher):
    lanes, d = p.lanes, p.x.shape[1]
    if tile_for(lanes, d, p.x.element_size(), device_of(p.x)).given:
        found = logits(p)
        alone = p._replace(v=None)
        mean = _mean(alone, gather(alone, found, spread=True)).repeat_interleave(p.v.shape[1], 0)
        about = mean.to(p.x.dtype)
        sums = gather(p, found, tilts(p, found, about), about)
    else:
        sums = gather(p)
        mean = _mean(p, sums)
    dots = mean.new_empty(sums.splits, lanes)
    width = min(triton.next_power_of_2(d), 1024)
    moved_dots[(sums.splits * lanes,)](
        sums.scalars, sums.vectors, mean, p.v, dots, lanes, d, D=width
    )
    out = p.v.new_empty(p.v.shape)
    grid, sizes = merge_grid(lanes, d)
    merge_matvec[grid](
        *(sums.scalars, sums.vectors, mean, dots, p.v, p.alpha, p.sigma, out),
        *(lanes, p.v.shape[1], d, sums.splits),
        FISHER=fisher,
        **sizes,
    )
    return out


def launch(x, y, v, alpha, sigma, log_prior, scale, offset, *, fisher):
    """As the ops: F v, or C v."""
    if v.numel() == 0:
        return v.new_empty(v.shape)
    return in_blocks(lambda p: _launch(p, fisher), x, y, v, alpha, sigma, log_prior, scale, offset)
