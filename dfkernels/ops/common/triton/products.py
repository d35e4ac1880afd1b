# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""Kernels for queries that take products: projections and moments about the centre, as matrix
products.

The factor `one` is explained in filter.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .functions import add_compensated, load_atoms, valid_atoms


@triton.jit
def product_projections_kernel(
    v,  # [targets, d]
    y,  # [N, d], rows y_stride apart
    centre,  # [d]
    shift,  # [targets]: <reference - centre, v>
    by_products,  # [B]: 1 for the queries that take products
    log_pi,  # [N], or None
    out,  # out [targets, N]
    N,
    d,
    y_stride,
    targets,
    vectors_per_query,
    one,
    scale,
    offset,
    PRIOR: tl.constexpr,
    AFFINE: tl.constexpr,
    D: tl.constexpr,
    ATOMS: tl.constexpr,
    QUERIES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out = <y - centre, v> - shift = <y - reference, v>."""
    target_blocks = tl.cdiv(targets, QUERIES)
    start = (tl.program_id(0) // target_blocks).to(tl.int64) * ATOMS
    i = tl.arange(0, ATOMS)[:, None]
    i_block = (tl.program_id(0) % target_blocks).to(tl.int64)
    i_target = i_block * QUERIES + tl.arange(0, QUERIES)[None, :]
    chosen = tl.load(
        by_products + i_target // vectors_per_query, mask=i_target < targets, other=0.0
    )
    active = chosen > 0
    valid = valid_atoms(log_pi, start, i, N, PRIOR)
    product = tl.zeros((ATOMS, QUERIES), tl.float32)
    for c in tl.range(0, tl.where(tl.max(chosen) > 0, tl.cdiv(d, D), 0), num_stages=STAGES):
        k = c * D + tl.arange(0, D)
        t = load_atoms(
            y, start, i, k[None, :], valid, y_stride, d, scale, offset, tl.float32, AFFINE
        )
        t -= tl.load(centre + k, mask=k < d, other=0.0)[None, :]
        v_mask = active & (k < d)[:, None]
        b_v = tl.load(v + i_target * d + k[:, None], mask=v_mask, other=0.0)
        product = product * one + tl.dot(t, b_v, input_precision="tf32x3")
    product -= tl.load(shift + i_target, mask=active, other=0.0)
    tl.store(out + i_target * N + start + i, product, mask=active & (i < N - start))


@triton.jit
def product_moments_kernel(
    logits,  # [B, N]
    max_logit,  # [B]
    by_products,  # [B]: 1 for the queries that take products
    y,  # [N, d], rows y_stride apart
    log_pi,  # [N], or None
    centre,  # [d]
    y_square,  # [N]: |y - centre|^2
    projections,  # [targets, N]: <y - reference, v>, or None
    reference,  # [targets, d]: the mean, or None
    scalars,  # out [4, splits, targets] and
    vectors,  # out [3, splits, targets, d], as those of the sweep
    N,
    d,
    y_stride,
    targets,
    vectors_per_query,
    splits,
    begin_split,  # the splits before it are the sweep's
    span,
    one,
    scale,
    offset,
    MATVEC: tl.constexpr,
    PRIOR: tl.constexpr,
    AFFINE: tl.constexpr,
    TRACE_ONLY: tl.constexpr,  # second_moment = sum e |t|^2/d in every coordinate: its sum counts
    D: tl.constexpr,
    ATOMS: tl.constexpr,
    QUERIES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """first_moment = e^T t, second_moment = e^T (t * t) or (e * projection)^T t, t = y - centre.

    One program has QUERIES targets, D coordinates and one split of the atoms.
    """
    parts = tl.cdiv(d, D)
    target_blocks = tl.cdiv(targets, QUERIES)
    k = tl.program_id(0) % parts * D + tl.arange(0, D)[None, :]
    i_block = (tl.program_id(0) // parts % target_blocks).to(tl.int64)
    i_target = i_block * QUERIES + tl.arange(0, QUERIES)[:, None]
    i_query = i_target // vectors_per_query
    split = (tl.program_id(0) // parts // target_blocks).to(tl.int64)
    chosen = tl.load(by_products + i_query, mask=i_target < targets, other=0)
    active = chosen > 0
    b_max_logit = tl.load(max_logit + i_query, mask=i_target < targets, other=0.0)
    b_centre = tl.load(centre + k, mask=k < d, other=0.0)
    begin = split * span
    tiles = tl.cdiv(tl.minimum(span, N - begin).to(tl.int32), ATOMS)
    tiles = tl.where(tl.max(chosen) > 0, tiles, 0)
    weight_sum = tl.zeros((QUERIES, 1), tl.float32)
    weight_lost = weight_sum
    weight_square_sum = weight_sum
    square_lost = weight_sum
    square_moment = weight_sum
    projection_sum = weight_sum
    first_moment = tl.zeros((QUERIES, D), tl.float32)
    second_moment = first_moment
    for tile in tl.range(0, tiles, num_stages=STAGES):
        start = begin + tile * ATOMS
        i = tl.arange(0, ATOMS)
        mask = (i < N - start)[None, :] & active
        p_logit = logits + i_query * N + start + i[None, :]
        e = tl.exp2(tl.load(p_logit, mask=mask, other=-float("inf")) - b_max_logit)
        valid = valid_atoms(log_pi, start, i[:, None], N, PRIOR)
        t = load_atoms(
            y, start, i[:, None], k, valid, y_stride, d, scale, offset, tl.float32, AFFINE
        )
        t = tl.where(valid, t - b_centre, 0.0)
        if MATVEC:
            p_projection = projections + i_target * N + start + i[None, :]
            projection = tl.load(p_projection, mask=mask, other=0.0)
            projection_sum += tl.sum(e * projection, 1, keep_dims=True)
            more = tl.dot(e * projection, t, input_precision="tf32x3")
            second_moment = second_moment * one + more
        else:
            first_moment = first_moment * one + tl.dot(e, t, input_precision="tf32x3")
            if TRACE_ONLY:
                b_y_square = tl.load(y_square + start + i, mask=i < N - start, other=0.0)
                square_moment += tl.sum(e * b_y_square[None, :], 1, keep_dims=True)
            else:
                more = tl.dot(e, t * t, input_precision="tf32x3")
                second_moment = second_moment * one + more
        e_sum, e_square_sum = tl.sum(e, 1, keep_dims=True), tl.sum(e * e, 1, keep_dims=True)
        weight_sum, weight_lost = add_compensated(weight_sum, weight_lost, e_sum)
        weight_square_sum, square_lost = add_compensated(
            weight_square_sum, square_lost, e_square_sum
        )
    if TRACE_ONLY:
        second_moment = tl.zeros((QUERIES, D), tl.float32) + square_moment / d
    mask = active & (k < d)
    b_reference = b_centre + tl.zeros_like(first_moment)
    out = (begin_split + split) * targets + i_target
    count = tl.full((), splits, tl.int64) * targets
    whole = (i_target < targets) & (tl.program_id(0) % parts == 0)
    tl.store(scalars + out, tl.where(active, b_max_logit, -float("inf")), mask=whole)
    tl.store(scalars + count + out, weight_sum + weight_lost, mask=whole)
    tl.store(scalars + 2 * count + out, weight_square_sum + square_lost, mask=whole)
    if MATVEC:  # about the mean, where the first moment vanishes
        b_reference = tl.load(reference + i_target * d + k, mask=mask, other=0.0)
        second_moment -= projection_sum * (b_reference - b_centre)
        tl.store(scalars + 3 * count + out, projection_sum, mask=whole)
    tl.store(vectors + out * d + k, b_reference, mask=mask)
    tl.store(vectors + (count + out) * d + k, first_moment, mask=mask)
    tl.store(vectors + (2 * count + out) * d + k, second_moment, mask=mask)
