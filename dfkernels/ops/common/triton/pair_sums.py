# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""Kernels that sum vectors with weights that another launch has written, one per pair: over the
atoms, for results per query, and over the queries, for results per atom.

Weights are 0 for most atoms where there is little noise. So a program looks at the weights of
several tiles together, and goes on where all of them are 0; an atom that it does read may be one
that holds NaN only if it is not masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .functions import any_true, index_along, load_atoms, valid_atoms
from .pair_weights import load_differences


@triton.jit
def pair_sums_kernel(
    y,  # [N, d], rows y_stride apart; the atoms are scale * y + offset
    dy,  # [N, d], rows dy_stride apart, or None
    log_pi,  # [N], or None
    reference,  # [B, d]; None unless DIFFERENCES
    coefficients,  # [targets, N]: c
    weights,  # [targets, N]: e, of dy; or None
    first,  # out [splits, targets, d]: sum c t + e dy
    second,  # out [splits, targets, d], SQUARES: sum c t * t + 2 e t * dy
    N,
    d,
    y_stride,
    dy_stride,
    targets,
    vectors_per_query,
    splits,
    span,  # atoms of a split
    scale,
    offset,
    DIFFERENCES: tl.constexpr,
    TANGENT: tl.constexpr,
    SQUARES: tl.constexpr,
    PRIOR: tl.constexpr,
    AFFINE: tl.constexpr,
    D: tl.constexpr,
    ATOMS: tl.constexpr,
    TARGETS: tl.constexpr,
    STRIP: tl.constexpr,  # tiles whose weights are looked at together
):
    """Sums over the atoms, t = y - reference or, without DIFFERENCES, t = y.

    One program has TARGETS targets, D coordinates and one split of the atoms.
    """
    T = coefficients.dtype.element_ty
    blocks, parts = tl.cdiv(targets, TARGETS), tl.cdiv(d, D)
    k = tl.program_id(0) % parts * D + index_along(D, 2)
    split = (tl.program_id(0) // parts // blocks).to(tl.int64)
    i_block = (tl.program_id(0) // parts % blocks).to(tl.int64)
    i_target = i_block * TARGETS + index_along(TARGETS, 0)
    active = i_target < targets
    i_query = i_target // vectors_per_query
    i = index_along(ATOMS, 1)
    begin = split * span
    tiles = tl.cdiv(tl.minimum(span, N - begin).to(tl.int32), ATOMS)
    b_first = tl.zeros((TARGETS, ATOMS, D), T)
    b_second = b_first
    for j in range(tl.cdiv(tiles, STRIP)):
        n = begin + j * STRIP * ATOMS + index_along(STRIP * ATOMS, 1)
        ahead = tl.load(coefficients + i_target * N + n, mask=(n < N) & active, other=0.0)
        weighs = ahead != 0
        if TANGENT:  # c may be 0 where e is not
            ahead = tl.load(weights + i_target * N + n, mask=(n < N) & active, other=0.0)
            weighs = weighs | (ahead != 0)
        end = tl.where(any_true(weighs), tl.minimum(tiles, (j + 1) * STRIP), j * STRIP)
        for tile in range(j * STRIP, end):
            start = begin + tile * ATOMS
            exists = (i < N - start) & active
            valid = valid_atoms(log_pi, start, i, N, PRIOR)
            p_pair = i_target * N + start + i
            c = tl.load(coefficients + p_pair, mask=exists, other=0.0)
            if DIFFERENCES:
                t = load_differences(
                    y, reference, start, i, k, i_query, valid, active, y_stride, d, scale, offset,
                    AFFINE,
                )  # fmt: skip
                ct = c * t
            else:  # values of any kind, which an atom without weight may hold
                t = load_atoms(y, start, i, k, valid, y_stride, d, scale, offset, T, AFFINE)
                ct = tl.where(c == 0, 0.0, c * t)
            b_first += ct
            if SQUARES:
                b_second += ct * t
            if TANGENT:
                e = tl.load(weights + p_pair, mask=exists, other=0.0)
                b_dy = load_atoms(dy, start, i, k, valid, dy_stride, d, 1.0, 0.0, T, False)
                b_first += e * b_dy
                if SQUARES:
                    b_second += 2 * e * b_dy * t
    p = (split * targets + i_target) * d + k
    tl.store(first + p, tl.sum(b_first, 1, keep_dims=True), mask=active & (k < d))
    if SQUARES:
        tl.store(second + p, tl.sum(b_second, 1, keep_dims=True), mask=active & (k < d))


@triton.jit
def pair_atoms_kernel(
    y,  # [N, d], rows y_stride apart; the atoms are scale * y + offset
    log_pi,  # [N], or None
    reference,  # [rows, d], or None unless DIFFERENCES
    curvature,  # [rows], or None unless DIFFERENCES
    pull,  # [rows, d]
    linear,  # [rows, d], or None
    quadratic,  # QUADRATIC = 1: [rows], 2: [rows, d], 0: None
    coefficients,  # [rows, N]: c
    weights,  # [rows, N]: e, or None
    out,  # in and out [N, d]
    N,
    d,
    y_stride,
    rows,
    scale,
    offset,
    LINEAR: tl.constexpr,
    QUADRATIC: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    PRIOR: tl.constexpr,
    AFFINE: tl.constexpr,
    D: tl.constexpr,
    ATOMS: tl.constexpr,
    STRIP: tl.constexpr,  # rows whose weights are looked at together
):
    """out += sum over rows of c pull + e linear and, with DIFFERENCES, of
    2 (e quadratic - c curvature) t, t = y - reference.

    A row is a query, or a query with one of its vectors. One program has ATOMS atoms and D
    coordinates, and goes over all rows.
    """
    T = out.dtype.element_ty
    parts = tl.cdiv(d, D)
    k = tl.program_id(0) % parts * D + tl.arange(0, D)[None, :]
    start = (tl.program_id(0) // parts).to(tl.int64) * ATOMS
    i = tl.arange(0, ATOMS)[:, None]
    exists = i < N - start
    valid = valid_atoms(log_pi, start, i, N, PRIOR)
    b_y = load_atoms(y, start, i, k, valid, y_stride, d, scale, offset, T, AFFINE)
    p_out = out + (start + i) * d + k
    total = tl.load(p_out, mask=exists & (k < d), other=0.0)
    for j in range(tl.cdiv(rows, STRIP)):
        ahead = (j * STRIP + tl.arange(0, STRIP)).to(tl.int64)[None, :]
        mask = exists & (ahead < rows)
        p_ahead = ahead * N + start + i
        weighs = tl.load(coefficients + p_ahead, mask=mask, other=0.0) != 0
        if LINEAR or QUADRATIC > 0:
            weighs = weighs | (tl.load(weights + p_ahead, mask=mask, other=0.0) != 0)
        end = tl.where(any_true(weighs), tl.minimum(rows, (j + 1) * STRIP), j * STRIP)
        part = tl.zeros((ATOMS, D), T)
        for row in range(j * STRIP, end):
            b = tl.full((), row, tl.int64)
            c = tl.load(coefficients + b * N + start + i, mask=exists, other=0.0)
            part += c * tl.load(pull + b * d + k, mask=k < d, other=0.0)
            if LINEAR or QUADRATIC > 0:
                e = tl.load(weights + b * N + start + i, mask=exists, other=0.0)
            if LINEAR:
                part += e * tl.load(linear + b * d + k, mask=k < d, other=0.0)
            if DIFFERENCES:
                t = b_y - tl.load(reference + b * d + k, mask=k < d, other=0.0)
                slope = -2 * c * tl.load(curvature + b)
                if QUADRATIC == 1:
                    slope += 2 * e * tl.load(quadratic + b)
                if QUADRATIC == 2:
                    slope += 2 * e * tl.load(quadratic + b * d + k, mask=k < d, other=0.0)
                part += slope * t
        total += part
    tl.store(p_out, total, mask=exists & (k < d))
