"""fisher_diagonal on CUDA: the sums of `posterior`, merged coordinate by coordinate."""

from __future__ import annotations

from ..common.triton.launch import gather, in_blocks, merge_grid
from ..common.triton.merge import merge_squares


def _launch(p):
    B, d = p.x.shape
    sums = gather(p)
    out = p.x.new_empty(B, d)
    grid, sizes = merge_grid(B, d)
    merge_squares[grid](
        *(sums.scalars, sums.vectors, p.alpha, p.sigma),
        *(out, out, out, out),  # only the diagonal is written
        *(B, d, sums.splits, sums.atoms),
        DIAGONAL=True,
        **sizes,
    )
    return out


def launch(x, y, alpha, sigma, log_prior, scale, offset):
    """As the op."""
    if x.shape[0] == 0:
        return x.new_empty(x.shape)
    return in_blocks(_launch, x, y, None, alpha, sigma, log_prior, scale, offset)
