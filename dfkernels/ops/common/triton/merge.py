"""Merges the sums of all splits, in double and in a fixed order, and makes of them what the ops
return.

w_s = exp(top_s - top) rescales split s, whose sums are about ref_s. With delta_s = ref_s - mean,
    mean = sum w (mass ref + first) / sum w mass
    sum e (y - mean)^2           = sum w (second + delta (2 first + mass delta))
    sum e (y - mean) <y - mean, v> = sum w (second + g first + (tilt + mass g) delta),  g_s =
    <delta_s, v>
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def split_weights(scalars, lane, lanes, splits, start, top, SPLITS: tl.constexpr):
    """Places of some splits' sums, which of them have any, and w_s [SPLITS, 1]."""
    s = start + tl.arange(0, SPLITS)[:, None]
    there = s < splits
    at = s.to(tl.int64) * lanes + lane
    log_w = tl.load(scalars + at, mask=there, other=-float("inf")) - top
    return at, there & (log_w != -float("inf")), tl.exp2(log_w).to(tl.float64)


@triton.jit
def top_of(scalars, lane, lanes, splits, SPLITS: tl.constexpr):
    top = tl.full((SPLITS, 1), -float("inf"), scalars.dtype.element_ty)
    for start in range(0, splits, SPLITS):
        s = start + tl.arange(0, SPLITS)[:, None]
        top = tl.maximum(
            top,
            tl.load(scalars + s.to(tl.int64) * lanes + lane, mask=s < splits, other=-float("inf")),
        )
    return tl.max(top)


@triton.jit
def totals(scalars, vectors, lane, lanes, k, d, splits, SPLITS: tl.constexpr, D: tl.constexpr):
    """top, sum w mass, sum w^2 square and mean at coordinates k [1, D], of all splits."""
    count = tl.full((), splits, tl.int64) * lanes
    top = top_of(scalars, lane, lanes, splits, SPLITS)
    mass = tl.zeros((SPLITS, 1), tl.float64)
    square = tl.zeros((SPLITS, 1), tl.float64)
    mean = tl.zeros((SPLITS, D), tl.float64)
    for start in range(0, splits, SPLITS):
        at, there, w = split_weights(scalars, lane, lanes, splits, start, top, SPLITS)
        m = w * tl.load(scalars + count + at, mask=there, other=0.0)
        mass += m
        square += w * w * tl.load(scalars + 2 * count + at, mask=there, other=0.0)
        cell = there & (k < d)
        ref = tl.load(vectors + at * d + k, mask=cell, other=0.0).to(tl.float64)
        mean += m * ref + w * tl.load(vectors + (count + at) * d + k, mask=cell, other=0.0)
    total = tl.sum(mass)
    return top, total, tl.sum(square), tl.sum(mean, 0, keep_dims=True) / total


@triton.jit
def merge_squares(
    scalars,
    vectors,
    alpha,
    sigma,
    mean,  # out [B, d]
    out,  # out: diag F [B, d], or the variance in parts [B, blocks of d], double
    log_prob,  # out [B]
    ess,  # out [B]
    lanes,
    d,
    splits,
    atoms,  # N where no log_pi was added, and every atom weighs 1/N; else 1
    DIAGONAL: tl.constexpr,
    SPLITS: tl.constexpr,
    D: tl.constexpr,
):
    """mean, log_prob, ess and the variance of `posterior`, or `fisher_diagonal`."""
    T = scalars.dtype.element_ty
    blocks = tl.cdiv(d, D)
    lane = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    k = block * D + tl.arange(0, D)[None, :]
    count = tl.full((), splits, tl.int64) * lanes
    top, total, square, middle = totals(scalars, vectors, lane, lanes, k, d, splits, SPLITS, D)
    variance = tl.zeros((SPLITS, D), tl.float64)
    for start in range(0, splits, SPLITS):
        at, there, w = split_weights(scalars, lane, lanes, splits, start, top, SPLITS)
        cell = there & (k < d)
        m = tl.load(scalars + count + at, mask=there, other=0.0).to(tl.float64)
        ref = tl.load(vectors + at * d + k, mask=cell, other=0.0).to(tl.float64)
        first = tl.load(vectors + (count + at) * d + k, mask=cell, other=0.0).to(tl.float64)
        second = tl.load(vectors + (2 * count + at) * d + k, mask=cell, other=0.0).to(tl.float64)
        moved = tl.where(cell, ref - middle, 0.0)
        variance += w * (second + moved * (2 * first + m * moved))
    variance = tl.sum(variance, 0, keep_dims=True) / total
    noise = tl.load(sigma + lane).to(tl.float64)
    if DIAGONAL:
        ratio = tl.load(alpha + lane) / noise
        variance = tl.where(variance < 0, 0.0, variance)
        f = (1 - ratio * ratio * variance) / (noise * noise)
        tl.store(out + lane * d + k, f.to(T), mask=k < d)
    else:
        tl.store(mean + lane * d + k, middle.to(T), mask=k < d)
        tl.store(out + lane * blocks + block, tl.sum(tl.where(k < d, variance, 0.0)))
        if block == 0:
            width = (0.9189385332046727 + tl.log(noise)) * d  # (d/2) log(2 pi sigma^2)
            share = total / tl.full(
                (), atoms, tl.float64
            )  # an integer: a float argument is a float32
            tl.store(log_prob + lane, (top * LN2 + tl.log(share) - width).to(T))
            tl.store(ess + lane, (total * total / square).to(T))


@triton.jit
def finish_trace(parts, alpha, sigma, trace, d, blocks, BLOCKS: tl.constexpr):
    """tr F = (d - (alpha/sigma)^2 tr C)/sigma^2 from the parts of tr C, one query per program."""
    b = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCKS,), tl.float64)
    for start in range(0, blocks, BLOCKS):
        i = start + tl.arange(0, BLOCKS)
        total += tl.load(parts + b * blocks + i, mask=i < blocks, other=0.0)
    noise = tl.load(sigma + b).to(tl.float64)
    ratio = tl.load(alpha + b) / noise
    variance = tl.sum(total)
    variance = tl.where(variance < 0, 0.0, variance)
    value = (d - ratio * ratio * variance) / (noise * noise)
    tl.store(trace + b, value.to(trace.dtype.element_ty))


@triton.jit
def merge_mean(scalars, vectors, mean, lanes, d, splits, SPLITS: tl.constexpr, D: tl.constexpr):
    """The mean, [lanes, d] in double."""
    blocks = tl.cdiv(d, D)
    lane = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * D + tl.arange(0, D)[None, :]
    _, _, _, middle = totals(scalars, vectors, lane, lanes, k, d, splits, SPLITS, D)
    tl.store(mean + lane * d + k, middle, mask=k < d)


@triton.jit
def moved_dots(scalars, vectors, mean, v, dots, lanes, d, D: tl.constexpr):
    """g_s = <ref_s - mean, v>, [splits, lanes] in double, one per program."""
    at = tl.program_id(0).to(tl.int64)
    lane = at % lanes
    end = tl.where(tl.load(scalars + at) == -float("inf"), 0, d)
    total = tl.zeros((D,), tl.float64)
    for start in range(0, end, D):
        k = start + tl.arange(0, D)
        cell = k < end
        moved = tl.load(vectors + at * d + k, mask=cell, other=0.0).to(tl.float64)
        moved -= tl.load(mean + lane * d + k, mask=cell, other=0.0)
        total += moved * tl.load(v + lane * d + k, mask=cell, other=0.0)
    tl.store(dots + at, tl.sum(total))


@triton.jit
def merge_matvec(
    scalars,
    vectors,
    mean,  # [lanes, d], double
    dots,  # [splits, lanes], double
    v,
    alpha,
    sigma,
    out,  # out [lanes, d]: F v, or C v
    lanes,
    per_query,
    d,
    splits,
    FISHER: tl.constexpr,
    SPLITS: tl.constexpr,
    D: tl.constexpr,
):
    """F v or C v."""
    blocks = tl.cdiv(d, D)
    lane = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * D + tl.arange(0, D)[None, :]
    count = tl.full((), splits, tl.int64) * lanes
    top = top_of(scalars, lane, lanes, splits, SPLITS)
    middle = tl.load(mean + lane * d + k, mask=k < d, other=0.0)
    mass = tl.zeros((SPLITS, 1), tl.float64)
    cv = tl.zeros((SPLITS, D), tl.float64)
    for start in range(0, splits, SPLITS):
        at, there, w = split_weights(scalars, lane, lanes, splits, start, top, SPLITS)
        cell = there & (k < d)
        m = tl.load(scalars + count + at, mask=there, other=0.0).to(tl.float64)
        tilt = tl.load(scalars + 3 * count + at, mask=there, other=0.0).to(tl.float64)
        g = tl.load(dots + at, mask=there, other=0.0)
        ref = tl.load(vectors + at * d + k, mask=cell, other=0.0).to(tl.float64)
        first = tl.load(vectors + (count + at) * d + k, mask=cell, other=0.0).to(tl.float64)
        second = tl.load(vectors + (2 * count + at) * d + k, mask=cell, other=0.0).to(tl.float64)
        cv += w * (second + g * first + (tilt + m * g) * tl.where(cell, ref - middle, 0.0))
        mass += w * m
    cv = tl.sum(cv, 0, keep_dims=True) / tl.sum(mass)
    if FISHER:
        query = lane // per_query
        noise = tl.load(sigma + query).to(tl.float64)
        ratio = tl.load(alpha + query) / noise
        own = tl.load(v + lane * d + k, mask=k < d, other=0.0)
        cv = (own - ratio * ratio * cv) / (noise * noise)
    tl.store(out + lane * d + k, cv.to(out.dtype.element_ty), mask=k < d)
