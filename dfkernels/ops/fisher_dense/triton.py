# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""fisher_dense on CUDA: sum e t t^T, t = y - mean, by matrix products in blocks of F.

In float64, for d <= 16 and with lists of atoms it is F on the d unit vectors of every query.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton.device import Device, device_of
from ..common.triton.functions import any_true, load_atoms, valid_atoms
from ..common.triton.halves import scale_of, split_halves
from ..common.triton.launch import (
    SplitMoments,
    accumulate,
    even_splits,
    in_query_groups,
    merged_mean,
    merged_weights,
    product_splits_for,
)
from ..common.triton.logits import compute_logits
from ..common.triton.problem import Problem
from ..fisher_matvec.triton import launch as matvec

ATOMS = 32  # of a tile


def block_sizes(d: int, device: Device) -> dict[str, int]:
    """The block of F of one program, and its warps. A large one is for tensor cores that read
    operands from memory, which leaves registers."""
    large = d > 64 and device.cc // 10 in (9, 10)
    return {"D": 128, "num_warps": 8} if large else {"D": 64, "num_warps": 4}


@triton.jit
def outer_products_kernel(
    logits,  # [B, N]
    max_logit,  # [B]
    reference,  # [B, d]
    y,  # [N, d], rows y_stride apart
    log_pi,  # [N], or None
    weight_sum,  # out [splits, B]
    out,  # out [splits, B, d, d]: the lower blocks, and their transposes
    N,
    d,
    y_stride,
    B,
    span,
    gap,
    scale,
    offset,
    PRIOR: tl.constexpr,
    AFFINE: tl.constexpr,
    D: tl.constexpr,
    ATOMS: tl.constexpr,
):
    """out = sum e t t^T and weight_sum = sum e over one split, t = y - reference.

    One program has one block of D x D entries. A tile is three products of halves: of e t, times
    the scale of each atom's t, and of t (../common/triton/halves.py).
    """
    parts = tl.cdiv(d, D)
    i_column = tl.program_id(0) % parts
    i_row = tl.program_id(0) // parts % parts
    b = (tl.program_id(0) // (parts * parts) % B).to(tl.int64)
    split = (tl.program_id(0) // (parts * parts) // B).to(tl.int64)
    begin = split * span
    tiles = tl.cdiv(tl.minimum(span, N - begin).to(tl.int32), ATOMS)
    tiles = tl.where(i_column > i_row, 0, tiles)
    rows = i_row * D + tl.arange(0, D)
    columns = i_column * D + tl.arange(0, D)
    row_reference = tl.load(reference + b * d + rows, mask=rows < d, other=0.0)[None, :]
    column_reference = tl.load(reference + b * d + columns, mask=columns < d, other=0.0)[None, :]
    b_max_logit = tl.load(max_logit + b)
    total = tl.zeros((ATOMS,), tl.float32)
    block = tl.zeros((D, D), tl.float32)
    n = tl.arange(0, ATOMS)
    for tile in range(tiles):
        start = begin + tile * ATOMS
        exists = n < N - start
        logit = tl.load(logits + b * N + start + n, mask=exists, other=-float("inf")) - b_max_logit
        if any_true((logit >= -gap) | (logit != logit)):
            e = tl.exp2(logit)
            total += e
            i, valid = n[:, None], valid_atoms(log_pi, start, n[:, None], N, PRIOR)
            t = load_atoms(
                y, start, i, rows[None, :], valid, y_stride, d, scale, offset, tl.float32, AFFINE
            )
            s = load_atoms(
                y, start, i, columns[None, :], valid, y_stride, d, scale, offset, tl.float32, AFFINE
            )
            t = tl.where(valid, e[:, None] * (t - row_reference), 0.0)
            s = tl.where(valid, s - column_reference, 0.0)
            unit, inverse = scale_of(tl.max(tl.abs(s), 1, keep_dims=True))
            first_s, second_s = split_halves(s * inverse)
            t *= unit
            unit, inverse = scale_of(tl.max(tl.abs(t)))
            first_t, second_t = split_halves(tl.trans(t * inverse))
            more = tl.dot(first_t, first_s)
            more = tl.dot(first_t, second_s, more)
            block += unit * tl.dot(second_t, first_s, more)
    p_out = out + (split * B + b) * d * d
    mask = (rows < d)[:, None] & (columns < d)[None, :]
    below, on_or_below = i_column < i_row, i_column <= i_row
    p_lower = p_out + rows[:, None].to(tl.int64) * d + columns[None, :]
    p_upper = p_out + rows[:, None] + columns[None, :].to(tl.int64) * d
    tl.store(p_lower, block, mask=mask & on_or_below)
    tl.store(p_upper, block, mask=mask & below)
    first_block = (i_row == 0) & (i_column == 0)
    tl.store(weight_sum + split * B + b, tl.sum(total), mask=first_block)


def _covariance(p: Problem) -> tuple[SplitMoments, Tensor, Tensor]:
    """The moments of the queries, their means and C, in double."""
    (B, d), N = p.x.shape, p.y.shape[0]
    logits = compute_logits(p)
    moments = accumulate(p, logits, trace_only=True)
    mean = merged_mean(moments, B, d)
    reference = mean.to(p.x.dtype)
    device = device_of(p.x)
    sizes = block_sizes(d, device)
    blocks = B * triton.cdiv(d, sizes["D"]) ** 2
    splits = product_splits_for(N, blocks, ATOMS, device)
    span, splits = even_splits(N, min(splits, triton.cdiv(N, 16 * ATOMS)), ATOMS)
    weight_sum, out = p.x.new_empty(splits, B), p.x.new_empty(splits, B, d, d)
    outer_products_kernel[(blocks * splits,)](
        **p.atom_arguments,
        logits=logits.value,
        max_logit=logits.max_logit,
        reference=reference,
        weight_sum=weight_sum,
        out=out,
        B=B,
        span=span,
        gap=p.gap,
        ATOMS=ATOMS,
        **sizes,
    )
    delta = mean - reference
    cov = out.sum(0, dtype=torch.float64) / weight_sum.sum(0, dtype=torch.float64)[:, None, None]
    cov -= delta[:, :, None] * delta[:, None, :]
    return moments, mean, cov


def _launch(p: Problem) -> Tensor:
    sigma, (_, _, cov) = p.sigma.double(), _covariance(p)
    cov *= -((p.alpha / sigma) ** 2)[:, None, None]
    cov.diagonal(dim1=1, dim2=2).add_(1)
    cov /= (sigma * sigma)[:, None, None]
    return ((cov + cov.mT) / 2).to(p.x.dtype)


def takes_products(x: Tensor, atoms: Tensor | None) -> bool:
    """Whether F is made by matrix products, rather than of products with unit vectors."""
    return atoms is None and x.shape[1] > 16 and x.dtype == torch.float32


def units(x: Tensor) -> Tensor:
    """The d unit vectors for every query."""
    return torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(len(x), -1, -1)


def about_mean(p: Problem) -> tuple[Tensor, ...]:
    """What `moments_about_mean` returns for the kind, by products."""
    moments, mean, cov = _covariance(p)
    shift, weight_square = merged_weights(moments)
    reference = mean.to(p.x.dtype)
    first = mean - reference
    second = (cov + cov.mT) / 2 + first[:, :, None] * first[:, None, :]
    return shift, reference, first, second, weight_square


def launch(x, y, alpha, sigma, log_prior, scale, offset, atoms=None, counts=None):
    """The op for flat tensors on one GPU."""
    if len(x) > 0 and takes_products(x, atoms):
        return in_query_groups(_launch, x, y, None, alpha, sigma, log_prior, scale, offset)
    given = (x, y, units(x), alpha, sigma, log_prior, scale, offset, atoms, counts)
    f = matvec(*given, fisher=True)
    return (f + f.mT) / 2
