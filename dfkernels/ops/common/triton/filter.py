# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""The kernel that computes expanded logits: all atoms against many queries, as a matrix product.

With x' = x - alpha centre and y' = y - centre,

    -|x - alpha y|^2/(2 sigma^2) = -(|x'|^2 - 2 alpha <x', y'> + alpha^2 |y'|^2)/(2 sigma^2)

It has two uses. On operands rounded to bfloat16, which changes <x', y'> by at most 2^-8 |x'| |y'|,
it is a filter: it writes an upper bound of every logit. For the queries whose |x'|^2 + alpha^2
|y'|^2 is of the size of d sigma^2, three products of tf32 parts (tf32x3) are as accurate as
differences, and it writes the logits themselves.

Tensor cores truncate when they add. So a product starts from zero in every tile and tiles are added
in float32; the factor `one`, which is 1, keeps the compiler from folding that addition into the
product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .functions import LOG2E, load_atoms, valid_atoms


@triton.jit
def filter_kernel(
    x,  # [B, d]: x', rounded
    y,  # [N, d], rows y_stride apart
    centre,  # [d]
    x_square,  # [B]: |x'|^2
    by_products,  # [B]: 1 for the queries whose logits come from here; None unless PRECISE
    alpha,  # [B]
    sigma,  # [B]
    log_pi,  # [N], or None
    upper,  # out [B, N]: upper bounds of the logits; PRECISE: the logits
    lower,  # out [B, tiles]: a lower bound of the tile's largest logit
    y_square,  # out [N]: |y'|^2, 0 for a masked atom
    N,
    d,
    y_stride,
    B,
    one,
    scale,
    offset,
    PRECISE: tl.constexpr,
    PRIOR: tl.constexpr,
    AFFINE: tl.constexpr,
    D: tl.constexpr,
    ATOMS: tl.constexpr,
    QUERIES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """upper = log2 pi - log2(e) (|x'|^2 - 2 alpha <x', y'> + alpha^2 |y'|^2)/(2 sigma^2) + error.

    One program has a tile of atoms and QUERIES queries. PRECISE: without the error, only for the
    queries that take products.
    """
    query_blocks = tl.cdiv(B, QUERIES)
    tile = (tl.program_id(0) // query_blocks).to(tl.int64)
    start = tile * ATOMS
    i = tl.arange(0, ATOMS)[:, None]
    i_block = (tl.program_id(0) % query_blocks).to(tl.int64)
    i_query = i_block * QUERIES + tl.arange(0, QUERIES)[None, :]
    active = i_query < B
    product = tl.zeros((ATOMS, QUERIES), tl.float32)
    b_y_square = tl.zeros((ATOMS, 1), tl.float32)
    chunks = tl.cdiv(d, D)
    if PRECISE:
        chosen = tl.load(by_products + i_query, mask=active, other=0)
        active &= chosen > 0
        chunks = tl.where(tl.max(chosen) > 0, chunks, 0)
    valid = valid_atoms(log_pi, start, i, N, PRIOR)
    for c in tl.range(0, chunks, num_stages=STAGES):
        k = c * D + tl.arange(0, D)
        t = load_atoms(
            y, start, i, k[None, :], valid, y_stride, d, scale, offset, tl.float32, AFFINE
        )
        t -= tl.load(centre + k, mask=k < d, other=0.0)[None, :]
        b_y_square += tl.sum(t * t, 1, keep_dims=True)
        x_mask = active & (k < d)[:, None]
        b_x = tl.load(x + i_query * d + k[:, None], mask=x_mask, other=0.0)
        if PRECISE:
            product = product * one + tl.dot(t, b_x, input_precision="tf32x3")
        else:
            product = tl.dot(t.to(b_x.dtype), b_x, product, input_precision="tf32")
    b_alpha = tl.load(alpha + i_query, mask=active, other=0.0)
    b_sigma = tl.load(sigma + i_query, mask=active, other=1.0)
    b_x_square = tl.load(x_square + i_query, mask=active, other=0.0)
    half = 0.5 * LOG2E / (b_sigma * b_sigma)
    logit = half * (2 * b_alpha * product - b_x_square - b_alpha * b_alpha * b_y_square)
    exists = active & (i < N - start)
    p_upper = upper + i_query * N + start + i
    if PRIOR:
        prior = LOG2E * tl.load(log_pi + start + i, mask=i < N - start, other=0.0)
        logit += prior
    if PRECISE:
        tl.store(p_upper, logit, mask=exists)
    else:
        # 2^-8 and 2^-18 for the roundings of the operands, d 2^-23 for the sums of products,
        # d/64 2^-23 for the sums of squares
        norms = tl.sqrt(b_x_square) * tl.abs(b_alpha) * tl.sqrt(b_y_square)
        error = half * (
            2 * norms * (0.00392 + d * 1.2e-7)
            + (2e-6 + d * 2e-9) * (b_x_square + b_alpha * b_alpha * b_y_square)
        )
        if PRIOR:
            error += tl.where(prior == -float("inf"), 0.0, -1e-6 * prior)
        tl.store(p_upper, logit + error, mask=exists)
        least = logit - error  # NaN where a square overflows: such atoms are computed again
        least = tl.where(exists & (least == least), least, -float("inf"))
        p_lower = lower + i_query * tl.cdiv(N, ATOMS) + tile
        tl.store(p_lower, tl.max(least, 0, keep_dims=True), mask=active)
        b_y_square = tl.where(valid, b_y_square, 0.0)  # of a masked atom it would be |centre|^2
        first_block = tl.program_id(0) % query_blocks == 0
        tl.store(y_square + start + i, b_y_square, mask=(i < N - start) & first_block)
