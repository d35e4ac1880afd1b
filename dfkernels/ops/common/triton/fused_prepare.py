# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""The kernels that prepare atoms and queries for one pass over the atoms (fused.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from .functions import LOG2E, load_atoms, valid_atoms
from .parts import split_parts


@triton.jit
def store_parts(parts, t, row, k, rows, D: tl.constexpr, PARTS: tl.constexpr):
    """Writes the first part, or where PARTS > 1 all three, of t [rows, D] to parts [*, rows, D]."""
    high, middle, low = split_parts(t)
    count = tl.full((), rows, tl.int64) * D
    out = parts + row.to(tl.int64) * D + k
    tl.store(out, high, mask=row < rows)
    if PARTS > 1:
        tl.store(out + count, middle, mask=row < rows)
        tl.store(out + 2 * count, low, mask=row < rows)


@triton.jit
def prepare_atoms_kernel(
    y,  # [N, d], rows y_stride apart; the atoms are scale * y + offset
    log_pi,  # [N], or None
    centre,  # [d]
    parts,  # out [PARTS, rows, D] bfloat16: of t = y - centre, 0 where there is no atom; the last
    # three of six of t * t
    whole,  # out [rows, W]: t, or None
    weights,  # out [rows, 2]: |t|^2, and log2 pi, -inf where there is no atom
    rows,  # N, made a multiple of what a program of the pass takes
    N,
    d,
    y_stride,
    scale,
    offset,
    PRIOR: tl.constexpr,
    AFFINE: tl.constexpr,
    PARTS: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program has ROWS atoms. A masked atom, which may hold NaN, becomes 0."""
    start = tl.program_id(0).to(tl.int64) * ROWS
    i = tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, D)[None, :]
    valid = valid_atoms(log_pi, start, i, N, PRIOR)
    t = load_atoms(y, start, i, k, valid, y_stride, d, scale, offset, tl.float32, AFFINE)
    t = tl.where(valid, t - tl.load(centre + k, mask=k < d, other=0.0), 0.0)
    square = t * t
    store_parts(parts, t, start + i, k, rows, D, PARTS)
    if PARTS == 6:
        store_parts(parts + 3 * tl.full((), rows, tl.int64) * D, square, start + i, k, rows, D, 3)
    if whole is not None:
        tl.store(whole + (start + i) * W + k, t, mask=(start + i < rows) & (k < W))
    bias = tl.where(valid, 0.0, -float("inf"))
    if PRIOR:
        bias = LOG2E * tl.load(log_pi + start + i, mask=i < N - start, other=-float("inf"))
    p_weights = weights + 2 * (start + i)
    tl.store(p_weights, tl.sum(square, 1, keep_dims=True), mask=start + i < rows)
    tl.store(p_weights + 1, bias, mask=start + i < rows)


@triton.jit
def prepare_vectors_kernel(
    x,  # [rows, d]
    parts,  # out [PARTS, rows, D] bfloat16
    whole,  # out [rows, W]: x, or None
    rows,
    d,
    PARTS: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program has ROWS vectors."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, D)[None, :]
    t = tl.load(x + row * d + k, mask=(row < rows) & (k < d), other=0.0)
    store_parts(parts, t, row, k, rows, D, PARTS)
    if whole is not None:
        tl.store(whole + row * W + k, t, mask=(row < rows) & (k < W))


@triton.jit
def load_moved(x, alpha, sigma, centre, row, k, B, d):
    """x' = x - alpha centre, alpha and sigma of some queries, in double, and |x'|^2."""
    mask = (row < B) & (k < d)
    b_alpha = tl.load(alpha + row, mask=row < B, other=0.0).to(tl.float64)
    b_sigma = tl.load(sigma + row, mask=row < B, other=1.0).to(tl.float64)
    b_centre = tl.load(centre + k, mask=k < d, other=0.0).to(tl.float64)
    t = tl.load(x + row * d + k, mask=mask, other=0.0).to(tl.float64) - b_alpha * b_centre
    return t, b_alpha, b_sigma, tl.sum(t * t, 1, keep_dims=True)


@triton.jit
def takes_products_kernel(
    x,  # [B, d]
    alpha,  # [B]
    sigma,  # [B]
    centre,  # [d]
    largest,  # the largest |t|^2 of the atoms
    takes,  # out [B]: 1 for the queries that take products, else 0
    B,
    d,
    SPARE: tl.constexpr,
    NEAR: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The rule of fused.py. One program has ROWS queries."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, D)[None, :]
    _, b_alpha, b_sigma, square = load_moved(x, alpha, sigma, centre, row, k, B, d)
    b_largest = tl.load(largest).to(tl.float64)
    ratio = b_alpha / (b_sigma * b_sigma)
    size = tl.abs(ratio) * tl.sqrt(square * b_largest) + b_alpha * ratio * b_largest / 2
    near = tl.where(b_largest < float("inf"), square, float("inf")) <= NEAR * d * (
        b_sigma * b_sigma
    )
    tl.store(takes + row, ((size <= d + SPARE) | near).to(tl.int32), mask=row < B)


@triton.jit
def place_queries_kernel(
    x,  # [B, d]
    alpha,  # [B]
    sigma,  # [B]
    centre,  # [d]
    takes,  # [B]: 1 for the queries that take products, else 0
    taken,  # [B]: their number up to each query, itself included
    back,  # out [B]: the place of each query; all that follows is in that order
    order,  # out [B]: the query at each place
    x_out,  # out [B, d]
    alpha_out,  # out [B]
    sigma_out,  # out [B]
    by_products,  # out [B]: takes
    common,  # out [B], double: what the logits leave out
    half,  # out [B]: log2(e) alpha^2/(2 sigma^2)
    q_norm,  # out [B]: |q|
    parts,  # out [PARTS, B, D] bfloat16: of q = log2(e) alpha/sigma^2 x'
    whole,  # out [B, W]: q, or None
    B,
    d,
    PARTS: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Puts the queries that take products after the others. One program has ROWS of them."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, D)[None, :]
    exists = row < B
    b_takes = tl.load(takes + row, mask=exists, other=0)
    b_taken = tl.load(taken + row, mask=exists, other=0)
    place = tl.where(b_takes > 0, B - tl.load(taken + (B - 1)) + b_taken - 1, row - b_taken)
    place = tl.where(exists, place, B)
    t, b_alpha, b_sigma, square = load_moved(x, alpha, sigma, centre, row, k, B, d)
    factor = LOG2E * (b_alpha / (b_sigma * b_sigma))
    lacking = tl.where(b_takes > 0, -square / (2 * b_sigma * b_sigma), 0.0)
    tl.store(back + row, place, mask=exists)
    tl.store(order + place, row, mask=exists)
    mask = exists & (k < d)
    tl.store(x_out + place * d + k, tl.load(x + row * d + k, mask=mask, other=0.0), mask=mask)
    tl.store(alpha_out + place, b_alpha.to(tl.float32), mask=exists)
    tl.store(sigma_out + place, b_sigma.to(tl.float32), mask=exists)
    tl.store(by_products + place, b_takes, mask=exists)
    tl.store(common + place, lacking, mask=exists)
    tl.store(half + place, (factor * b_alpha / 2).to(tl.float32), mask=exists)
    tl.store(q_norm + place, (tl.abs(factor) * tl.sqrt(square)).to(tl.float32), mask=exists)
    b_q = (factor * t).to(tl.float32)
    store_parts(parts, b_q, place, k, B, D, PARTS)
    if whole is not None:
        tl.store(whole + place * W + k, b_q, mask=exists & (k < W))
