# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""The kernel that computes logits, or projections <t, v>, in the difference form."""

from __future__ import annotations

import triton
import triton.language as tl

from .functions import (
    LOG2E,
    any_true,
    index_along,
    list_of,
    listed_rows,
    load_atoms,
    valid_atoms,
)


@triton.jit
def differences_kernel(
    point,  # [B, d]: the anchor; PROJECT: the reference of every target, [targets, d]
    rest,  # [B, d]: x = anchor + rest; None if PROJECT
    y,  # [N, d], rows y_stride apart
    v,  # [targets, d], or None
    alpha,  # [B]
    sigma,  # [B]
    log_pi,  # [N], or None
    atoms,  # as in sweep.py, and so are first and the shapes of bounds and out
    first,
    bounds,  # [B, N]: upper bounds of the logits, or None; may be the same memory as out
    floor,  # [B]: a lower bound of the largest logit, or None; inf: skip the query
    out,  # out [targets, N]
    largest,  # out [B, programs]: the largest of a program's logits that may matter, or None
    N,
    d,
    y_stride,
    targets,
    vectors_per_query,
    gap,
    scale,
    offset,
    PROJECT: tl.constexpr,
    FILTERED: tl.constexpr,  # only where bounds >= floor - gap
    PRIOR: tl.constexpr,
    AFFINE: tl.constexpr,
    D: tl.constexpr,
    ATOMS: tl.constexpr,
    TARGETS: tl.constexpr,
    STRIP: tl.constexpr,  # tiles of one program
):
    """out = log2 pi - log2(e) (|x - alpha y|^2 - |rest|^2)/(2 sigma^2), or, with PROJECT,
    <y - reference, v>.

    One program has TARGETS targets and STRIP tiles of atoms. FILTERED skips a tile in which no atom
    of these targets can matter; out is then not written there.
    """
    T = point.dtype.element_ty
    target_blocks = tl.cdiv(targets, TARGETS)
    begin = (tl.program_id(0) // target_blocks).to(tl.int64) * ATOMS * STRIP
    i_block = (tl.program_id(0) % target_blocks).to(tl.int64)
    i_target = i_block * TARGETS + index_along(TARGETS, 0)
    active = i_target < targets
    i_query = i_target // vectors_per_query
    i_row = i_target if PROJECT else i_query  # of point
    b_alpha = tl.load(alpha + i_query, mask=active, other=0.0)
    i = index_along(ATOMS, 1)
    if atoms is None:
        count, i_pair, i_out = N, i_query * N, i_target * N
    else:
        count, i_pair, i_out = list_of(first, i_block, vectors_per_query)
    tiles = tl.cdiv(tl.maximum(tl.minimum(STRIP * ATOMS, count - begin), 0).to(tl.int32), ATOMS)
    if FILTERED:
        least = tl.load(floor + i_query, mask=active, other=float("inf")) - gap
        active = active & (least != float("inf"))
        n = begin + index_along(STRIP * ATOMS, 1)
        ahead = tl.load(bounds + i_pair + n, mask=(n < count) & active, other=-float("inf"))
        tiles = tl.where(any_true((ahead >= least) | (ahead != ahead)), tiles, 0)
    peak = tl.full((TARGETS, 1, 1), -float("inf"), T)
    for tile in range(tiles):
        start = begin + tile * ATOMS
        exists = i < count - start
        row, i_atom = listed_rows(atoms, i_pair, start, i, exists, N)
        valid = valid_atoms(log_pi, row, i_atom, N, PRIOR)
        p_out = out + i_out + start + i
        chunks = tl.cdiv(d, D)
        if FILTERED:
            p_bound = bounds + i_pair + start + i
            bound = tl.load(p_bound, mask=exists & active, other=-float("inf"))
            chunks = tl.where(any_true((bound >= least) | (bound != bound)), chunks, 0)
        total = tl.zeros((TARGETS, ATOMS, D), T)
        for c in range(chunks):
            k = c * D + index_along(D, 2)
            mask = active & (k < d)
            b_y = load_atoms(y, row, i_atom, k, valid, y_stride, d, scale, offset, T, AFFINE)
            b_point = tl.load(point + i_row * d + k, mask=mask, other=0.0)
            if PROJECT:
                total += (b_y - b_point) * tl.load(v + i_target * d + k, mask=mask, other=0.0)
            else:
                a = b_point - b_alpha * b_y
                b_rest = tl.load(rest + i_row * d + k, mask=mask, other=0.0)
                total += a * (a + 2 * b_rest)
        value = tl.sum(total, 2, keep_dims=True)
        if not PROJECT:
            b_sigma = tl.load(sigma + i_query, mask=active, other=1.0)
            overflow = ~(value < float("inf"))
            value *= -0.5 * LOG2E / (b_sigma * b_sigma)
            if any_true(overflow):  # an outlier keeps -inf; where anything is no number, NaN
                taint = tl.zeros((TARGETS, ATOMS, 1), T)
                for c in range(chunks):
                    k = c * D + index_along(D, 2)
                    b_y = load_atoms(
                        y, row, i_atom, k, valid, y_stride, d, scale, offset, T, AFFINE
                    )
                    b_point = tl.load(point + i_row * d + k, mask=active & (k < d), other=0.0)
                    taint += tl.sum(0.0 * b_point + 0.0 * b_y, 2, keep_dims=True)
                value += taint
            if PRIOR:
                value += LOG2E * tl.load(log_pi + row + i_atom, mask=exists, other=0.0)
        written = active & exists & (chunks > 0)
        tl.store(p_out, value, mask=written)
        if largest is not None:  # what is no number is left to the sums
            counts = tl.where(written & (value == value), value, -float("inf"))
            peak = tl.maximum(peak, tl.max(counts, 1, keep_dims=True))
    if largest is not None:
        strips = tl.cdiv(N, ATOMS * STRIP)
        p_largest = largest + i_target * strips + begin // (ATOMS * STRIP)
        tl.store(p_largest, peak, mask=i_target < targets)
