"""fisher_dense on CUDA: sum e t t^T about the mean by matrix products, t = y - mean, in blocks of
F.

float64, and d <= 16: F on the d unit vectors of every query, which share its pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.triton.device import device_of
from ..common.triton.functions import load_atoms, real_atoms
from ..common.triton.launch import gather, in_blocks, merge_grid, splits_of_products
from ..common.triton.logits import logits
from ..common.triton.merge import merge_mean
from ..common.triton.problem import gap_of
from ..fisher_matvec.triton import launch as matvec

D, ATOMS = 64, 32


@triton.jit
def outer_sums(
    given,  # [B, N]: logits
    top,  # [B]: the largest
    about,  # [B, d]
    y,  # [N, d], rows ldy apart
    log_pi,  # [N]
    mass,  # out [splits, B]
    out,  # out [splits, B, d, d]: the lower blocks, and their transposes
    N,
    d,
    ldy,
    B,
    span,
    gap,
    keep,
    scale,
    offset,
    PRIOR: tl.constexpr,
    AFFINE: tl.constexpr,
    D: tl.constexpr,
    ATOMS: tl.constexpr,
):
    """sum e and sum e t t^T, t = y - about. keep: as in `_triton_products`."""
    parts = tl.cdiv(d, D)
    j = tl.program_id(0) % parts
    i = tl.program_id(0) // parts % parts
    b = (tl.program_id(0) // (parts * parts) % B).to(tl.int64)
    split = (tl.program_id(0) // (parts * parts) // B).to(tl.int64)
    begin = split * span
    tiles = tl.where(j > i, 0, tl.cdiv(tl.minimum(span, N - begin).to(tl.int32), ATOMS))
    rows = i * D + tl.arange(0, D)
    columns = j * D + tl.arange(0, D)
    at_rows = tl.load(about + b * d + rows, mask=rows < d, other=0.0)[None, :]
    at_columns = tl.load(about + b * d + columns, mask=columns < d, other=0.0)[None, :]
    largest = tl.load(top + b)
    total = tl.zeros((ATOMS,), tl.float32)
    block = tl.zeros((D, D), tl.float32)
    n = tl.arange(0, ATOMS)
    for tile in range(tiles):
        start = begin + tile * ATOMS
        here = n < N - start
        logit = tl.load(given + b * N + start + n, mask=here, other=-float("inf")) - largest
        if tl.max(((logit >= -gap) | (logit != logit)).to(tl.int32)) > 0:
            e = tl.exp2(logit)
            total += e
            i_n, real = n[:, None], real_atoms(log_pi, start, n[:, None], N, PRIOR)
            t = load_atoms(
                y, start, i_n, rows[None, :], real, ldy, d, scale, offset, tl.float32, AFFINE
            )
            s = load_atoms(
                y, start, i_n, columns[None, :], real, ldy, d, scale, offset, tl.float32, AFFINE
            )
            et = tl.where(real, e[:, None] * (t - at_rows), 0.0)
            s = tl.where(real, s - at_columns, 0.0)
            block = block * keep + tl.dot(tl.trans(et), s, input_precision="tf32x3")
    first = out + (split * B + b) * d * d
    real = (rows < d)[:, None] & (columns < d)[None, :]
    tl.store(first + rows[:, None].to(tl.int64) * d + columns[None, :], block, mask=real & (j <= i))
    tl.store(first + rows[:, None] + columns[None, :].to(tl.int64) * d, block, mask=real & (j < i))
    tl.store(mass + split * B + b, tl.sum(total), mask=(i == 0) & (j == 0))


def _launch(p):
    (B, d), N = p.x.shape, p.y.shape[0]
    found = logits(p)
    sums = gather(p, found)
    mean = p.x.new_empty(B, d, dtype=torch.float64)
    grid, sizes = merge_grid(B, d)
    merge_mean[grid](sums.scalars, sums.vectors, mean, B, d, sums.splits, **sizes)
    about = mean.to(p.x.dtype)
    blocks = B * triton.cdiv(d, D) ** 2
    splits = min(splits_of_products(N, blocks, ATOMS, device_of(p.x)), triton.cdiv(N, 16 * ATOMS))
    span = triton.cdiv(triton.cdiv(N, splits), ATOMS) * ATOMS
    splits = triton.cdiv(N, span)
    mass, out = p.x.new_empty(splits, B), p.x.new_empty(splits, B, d, d)
    outer_sums[(blocks * splits,)](
        *(found.given, found.top, about, p.y, p.x if p.log_pi is None else p.log_pi, mass, out),
        *(N, d, p.y.stride(0), B, span, gap_of(p), 1.0, p.scale, p.offset),
        **p.flags,
        D=D,
        ATOMS=ATOMS,
        num_warps=4,
    )
    rest, noise = mean - about, p.sigma.double()
    cov = out.sum(0, dtype=torch.float64) / mass.sum(0, dtype=torch.float64)[:, None, None]
    cov -= rest[:, :, None] * rest[:, None, :]
    cov *= -((p.alpha / noise) ** 2)[:, None, None]
    cov.diagonal(dim1=1, dim2=2).add_(1)
    cov /= (noise * noise)[:, None, None]
    return ((cov + cov.mT) / 2).to(p.x.dtype)


def launch(x, y, alpha, sigma, log_prior, scale, offset):
    """As the op."""
    B, d = x.shape
    if B > 0 and d > 16 and x.dtype == torch.float32:
        return in_blocks(_launch, x, y, None, alpha, sigma, log_prior, scale, offset)
    units = torch.eye(d, dtype=x.dtype, device=x.device).expand(B, d, d)
    f = matvec(x, y, units, alpha, sigma, log_prior, scale, offset, fisher=True)
    return (f + f.mT) / 2
