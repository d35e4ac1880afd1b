# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""Kernels that merge the moments of all splits, in double and in a fixed order, and finish results.

w_s = 2^(max_logit_s - max_logit) rescales split s, whose moments are about reference_s. With
delta_s = reference_s - mean and g_s = <delta_s, v>,

    mean = sum w (weight_sum reference + first_moment) / sum w weight_sum
    sum e (y - mean)^2 = sum w (second_moment + delta (2 first_moment + weight_sum delta))
    sum e (y - mean) <y - mean, v>
        = sum w (second_moment + g first_moment + (projection_sum + weight_sum g) delta)
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def split_weights(scalars, i_target, targets, splits, start, max_logit, SPLITS: tl.constexpr):
    """Where some splits' moments lie, which of these splits have weight, and w_s [SPLITS, 1]."""
    s = start + tl.arange(0, SPLITS)[:, None]
    exists = s < splits
    i_split = s.to(tl.int64) * targets + i_target
    log_w = tl.load(scalars + i_split, mask=exists, other=-float("inf")) - max_logit
    return i_split, exists & (log_w != -float("inf")), tl.exp2(log_w).to(tl.float64)


@triton.jit
def load_max_logit(scalars, i_target, targets, splits, SPLITS: tl.constexpr):
    """The target's largest logit in all splits."""
    max_logit = tl.full((SPLITS, 1), -float("inf"), scalars.dtype.element_ty)
    for start in range(0, splits, SPLITS):
        s = start + tl.arange(0, SPLITS)[:, None]
        p_max_logit = scalars + s.to(tl.int64) * targets + i_target
        max_logit = tl.maximum(
            max_logit, tl.load(p_max_logit, mask=s < splits, other=-float("inf"))
        )
    return tl.max(max_logit)


@triton.jit
def merge_first_moments(
    scalars, vectors, i_target, targets, k, d, splits, SPLITS: tl.constexpr, D: tl.constexpr
):
    """max_logit, sum w weight_sum, sum w^2 weight_square_sum, and the mean at coordinates k."""
    count = tl.full((), splits, tl.int64) * targets
    max_logit = load_max_logit(scalars, i_target, targets, splits, SPLITS)
    weight_sum = tl.zeros((SPLITS, 1), tl.float64)
    weight_square_sum = tl.zeros((SPLITS, 1), tl.float64)
    mean = tl.zeros((SPLITS, D), tl.float64)
    for start in range(0, splits, SPLITS):
        i_split, valid, w = split_weights(
            scalars, i_target, targets, splits, start, max_logit, SPLITS
        )
        weight = w * tl.load(scalars + count + i_split, mask=valid, other=0.0)
        weight_sum += weight
        weight_square_sum += w * w * tl.load(scalars + 2 * count + i_split, mask=valid, other=0.0)
        mask = valid & (k < d)
        reference = tl.load(vectors + i_split * d + k, mask=mask, other=0.0).to(tl.float64)
        first_moment = tl.load(vectors + (count + i_split) * d + k, mask=mask, other=0.0)
        mean += weight * reference + w * first_moment
    total = tl.sum(weight_sum)
    return max_logit, total, tl.sum(weight_square_sum), tl.sum(mean, 0, keep_dims=True) / total


@triton.jit
def log_density(sigma, common, i_target, max_logit, total, d, atoms):
    """log q in double. atoms is an integer: a float argument would be a float32."""
    b_sigma = tl.load(sigma + i_target).to(tl.float64)
    log_norm = (0.9189385332046727 + tl.log(b_sigma)) * d  # (d/2) log(2 pi sigma^2)
    share = total / tl.full((), atoms, tl.float64)
    return max_logit.to(tl.float64) * LN2 + tl.load(common + i_target) + tl.log(share) - log_norm


@triton.jit
def merge_log_prob_kernel(
    scalars, sigma, common, log_prob, targets, d, splits, atoms, SPLITS: tl.constexpr
):
    """log_prob [B] alone, one query per program."""
    i_target = tl.program_id(0).to(tl.int64)
    count = tl.full((), splits, tl.int64) * targets
    max_logit = load_max_logit(scalars, i_target, targets, splits, SPLITS)
    weight_sum = tl.zeros((SPLITS, 1), tl.float64)
    for start in range(0, splits, SPLITS):
        i_split, valid, w = split_weights(
            scalars, i_target, targets, splits, start, max_logit, SPLITS
        )
        weight_sum += w * tl.load(scalars + count + i_split, mask=valid, other=0.0)
    b_log_prob = log_density(sigma, common, i_target, max_logit, tl.sum(weight_sum), d, atoms)
    tl.store(log_prob + i_target, b_log_prob.to(log_prob.dtype.element_ty))


@triton.jit
def merge_squares_kernel(
    scalars,
    vectors,
    alpha,  # [B]; None, with sigma: diag C instead of diag F
    sigma,  # [B], or None
    common,  # [B], double: what the logits leave out; None, with log_prob
    mean,  # out [B, d], or None
    out,  # out: diag F or diag C [B, d], or tr C in parts [B, blocks of d], double
    log_prob,  # out [B], or None
    ess,  # out [B], or None
    targets,
    d,
    splits,
    atoms,  # N where no log_pi was added, and every atom weighs 1/N; else 1
    DIAGONAL: tl.constexpr,
    SPLITS: tl.constexpr,
    D: tl.constexpr,
):
    """diag C = sum e (y - mean)^2 / sum e; then DIAGONAL: diag F = (1 - (alpha/sigma)^2 diag C) /
    sigma^2, else the parts of tr C; and those of mean, log_prob and ess that are asked for."""
    T = scalars.dtype.element_ty
    blocks = tl.cdiv(d, D)
    i_target = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    k = block * D + tl.arange(0, D)[None, :]
    count = tl.full((), splits, tl.int64) * targets
    max_logit, total, weight_square_sum, b_mean = merge_first_moments(
        scalars, vectors, i_target, targets, k, d, splits, SPLITS, D
    )
    variance = tl.zeros((SPLITS, D), tl.float64)
    for start in range(0, splits, SPLITS):
        i_split, valid, w = split_weights(
            scalars, i_target, targets, splits, start, max_logit, SPLITS
        )
        mask = valid & (k < d)
        weight_sum = tl.load(scalars + count + i_split, mask=valid, other=0.0).to(tl.float64)
        reference = tl.load(vectors + i_split * d + k, mask=mask, other=0.0).to(tl.float64)
        p_first = vectors + (count + i_split) * d + k
        first_moment = tl.load(p_first, mask=mask, other=0.0).to(tl.float64)
        p_second = vectors + (2 * count + i_split) * d + k
        second_moment = tl.load(p_second, mask=mask, other=0.0).to(tl.float64)
        delta = tl.where(mask, reference - b_mean, 0.0)
        variance += w * (second_moment + delta * (2 * first_moment + weight_sum * delta))
    variance = tl.sum(variance, 0, keep_dims=True) / total
    if DIAGONAL:
        if sigma is not None:
            b_sigma = tl.load(sigma + i_target).to(tl.float64)
            ratio = tl.load(alpha + i_target) / b_sigma
            variance = tl.where(variance < 0, 0.0, variance)
            variance = (1 - ratio * ratio * variance) / (b_sigma * b_sigma)
        tl.store(out + i_target * d + k, variance.to(out.dtype.element_ty), mask=k < d)
    else:
        tl.store(out + i_target * blocks + block, tl.sum(tl.where(k < d, variance, 0.0)))
    if mean is not None:
        tl.store(mean + i_target * d + k, b_mean.to(mean.dtype.element_ty), mask=k < d)
    if log_prob is not None and block == 0:
        b_log_prob = log_density(sigma, common, i_target, max_logit, total, d, atoms)
        tl.store(log_prob + i_target, b_log_prob.to(T))
        tl.store(ess + i_target, (total * total / weight_square_sum).to(T))


@triton.jit
def finish_trace_kernel(parts, alpha, sigma, trace, d, blocks, BLOCKS: tl.constexpr):
    """tr F = (d - (alpha/sigma)^2 tr C)/sigma^2 from the parts of tr C, one query per program."""
    b = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCKS,), tl.float64)
    for start in range(0, blocks, BLOCKS):
        i = start + tl.arange(0, BLOCKS)
        total += tl.load(parts + b * blocks + i, mask=i < blocks, other=0.0)
    b_sigma = tl.load(sigma + b).to(tl.float64)
    ratio = tl.load(alpha + b) / b_sigma
    variance = tl.sum(total)
    variance = tl.where(variance < 0, 0.0, variance)
    value = (d - ratio * ratio * variance) / (b_sigma * b_sigma)
    tl.store(trace + b, value.to(trace.dtype.element_ty))


@triton.jit
def merge_mean_kernel(
    scalars, vectors, mean, targets, d, splits, SPLITS: tl.constexpr, D: tl.constexpr
):
    """mean = sum w (weight_sum reference + first_moment) / sum w weight_sum, [targets, d] in
    double."""
    blocks = tl.cdiv(d, D)
    i_target = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * D + tl.arange(0, D)[None, :]
    _, _, _, b_mean = merge_first_moments(
        scalars, vectors, i_target, targets, k, d, splits, SPLITS, D
    )
    tl.store(mean + i_target * d + k, b_mean, mask=k < d)


@triton.jit
def reference_projections_kernel(scalars, vectors, mean, v, out, targets, d, D: tl.constexpr):
    """g_s = <reference_s - mean, v>, [splits, targets] in double, one per program."""
    i_split = tl.program_id(0).to(tl.int64)
    i_target = i_split % targets
    end = tl.where(tl.load(scalars + i_split) == -float("inf"), 0, d)
    total = tl.zeros((D,), tl.float64)
    for start in range(0, end, D):
        k = start + tl.arange(0, D)
        mask = k < end
        delta = tl.load(vectors + i_split * d + k, mask=mask, other=0.0).to(tl.float64)
        delta -= tl.load(mean + i_target * d + k, mask=mask, other=0.0)
        total += delta * tl.load(v + i_target * d + k, mask=mask, other=0.0)
    tl.store(out + i_split, tl.sum(total))


@triton.jit
def merge_matvec_kernel(
    scalars,
    vectors,
    mean,  # [targets, d], double
    reference_projections,  # [splits, targets], double
    v,
    alpha,
    sigma,
    out,  # out [targets, d]: F v, or C v
    targets,
    vectors_per_query,
    d,
    splits,
    FISHER: tl.constexpr,
    SPLITS: tl.constexpr,
    D: tl.constexpr,
):
    """C v = sum e (y - mean) <y - mean, v> / sum e, or F v = (v - (alpha/sigma)^2 C v)/sigma^2."""
    blocks = tl.cdiv(d, D)
    i_target = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * D + tl.arange(0, D)[None, :]
    count = tl.full((), splits, tl.int64) * targets
    max_logit = load_max_logit(scalars, i_target, targets, splits, SPLITS)
    b_mean = tl.load(mean + i_target * d + k, mask=k < d, other=0.0)
    total = tl.zeros((SPLITS, 1), tl.float64)
    cv = tl.zeros((SPLITS, D), tl.float64)
    for start in range(0, splits, SPLITS):
        i_split, valid, w = split_weights(
            scalars, i_target, targets, splits, start, max_logit, SPLITS
        )
        mask = valid & (k < d)
        weight_sum = tl.load(scalars + count + i_split, mask=valid, other=0.0).to(tl.float64)
        projection_sum = tl.load(scalars + 3 * count + i_split, mask=valid, other=0.0)
        projection_sum = projection_sum.to(tl.float64)
        g = tl.load(reference_projections + i_split, mask=valid, other=0.0)
        reference = tl.load(vectors + i_split * d + k, mask=mask, other=0.0).to(tl.float64)
        p_first = vectors + (count + i_split) * d + k
        first_moment = tl.load(p_first, mask=mask, other=0.0).to(tl.float64)
        p_second = vectors + (2 * count + i_split) * d + k
        second_moment = tl.load(p_second, mask=mask, other=0.0).to(tl.float64)
        projection = projection_sum + weight_sum * g
        delta = tl.where(mask, reference - b_mean, 0.0)
        cv += w * (second_moment + g * first_moment + projection * delta)
        total += w * weight_sum
    cv = tl.sum(cv, 0, keep_dims=True) / tl.sum(total)
    if FISHER:
        i_query = i_target // vectors_per_query
        b_sigma = tl.load(sigma + i_query).to(tl.float64)
        ratio = tl.load(alpha + i_query) / b_sigma
        b_v = tl.load(v + i_target * d + k, mask=k < d, other=0.0)
        cv = (b_v - ratio * ratio * cv) / (b_sigma * b_sigma)
    tl.store(out + i_target * d + k, cv.to(out.dtype.element_ty), mask=k < d)
