# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""The kernel that computes one weight per query and atom, c = e f, for first derivatives.

About the given reference, with t = y - reference, r = (x - alpha reference)/sigma and a =
alpha/sigma, what is constant per query is combined beforehand, in double (pair.py):

    log e = log_pi + <t, pull> - curvature |t|^2 - level
            pull = a r,  curvature = a^2/2,  level = shift + |r|^2/2
    f = constant + <t, linear + quadratic t> + products + dlog_pi + <dy, pull - 2 curvature t>
    c = e (f + square e)

The largest e is of order one, and so no term that is common to all atoms costs float32 its digits.
A tile has coordinates along COORD_AXIS, atoms along axis 1, queries along the third axis, as in
sweep.py. Where a tile is WHOLE, that is, holds all d coordinates, the sums over the atoms are taken
at once; else the weights go to scratch memory, for pair_sums.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .functions import exponential, index_along, load_atoms, valid_atoms


@triton.jit
def load_differences(
    y, reference, start, i, k, i_query, valid, active, y_stride, d, scale, offset, AFFINE
):
    """t = y - reference; the reference's dtype is the compute dtype."""
    T = reference.dtype.element_ty
    b_y = load_atoms(y, start, i, k, valid, y_stride, d, scale, offset, T, AFFINE)
    return b_y - tl.load(reference + i_query * d + k, mask=active & (k < d), other=0.0)


@triton.jit
def form_products(
    t, b_dy, pull, linear, quadratic, p, mask, LINEAR: tl.constexpr, QUADRATIC: tl.constexpr
):
    """Coordinate by coordinate: pull t, t^2, (linear + quadratic t) t, and those of dy with pull
    and t. `p` are the places in [B, d]."""
    b_pull = tl.load(pull + p, mask=mask, other=0.0)
    square = t * t
    form = tl.zeros_like(t)
    if LINEAR:
        form += t * tl.load(linear + p, mask=mask, other=0.0)
    if QUADRATIC == 2:
        form += square * tl.load(quadratic + p, mask=mask, other=0.0)
    return b_pull * t, square, form, b_pull * b_dy, t * b_dy


@triton.jit
def pair_weights_kernel(
    y,  # [N, d], rows y_stride apart; the atoms are scale * y + offset
    dy,  # [N, d], rows dy_stride apart: a tangent of the atoms; None unless TANGENT
    log_pi,  # [N], or None
    dlog_pi,  # [N], or None
    reference,  # [B, d]
    pull,  # [B, d]
    curvature,  # [B]
    level,  # [B]
    constant,  # [B]
    linear,  # [B, d], or None
    quadratic,  # QUADRATIC = 1: [B], 2: [B, d], 0: None
    square,  # [B]
    products,  # [B, N], or None
    coefficients,  # out [B, N]: c, or None
    weights,  # out [B, N]: e, or None
    totals,  # out [3, splits, B]: sums of c, of c |t|^2 + 2 e <t, dy>, and of e c
    first,  # out [splits, B, d], WHOLE: sum c t + e dy
    second,  # out [splits, B, d], SQUARES: sum c t * t + 2 e t * dy
    N,
    d,
    y_stride,
    dy_stride,
    B,
    splits,
    span,  # atoms of a split
    scale,
    offset,
    LINEAR: tl.constexpr,
    QUADRATIC: tl.constexpr,
    TANGENT: tl.constexpr,
    WHOLE: tl.constexpr,
    SQUARES: tl.constexpr,
    PRIOR: tl.constexpr,
    AFFINE: tl.constexpr,
    D: tl.constexpr,
    ATOMS: tl.constexpr,
    QUERIES: tl.constexpr,
    COORD_AXIS: tl.constexpr,
):
    """c of the module's docstring; one program has QUERIES queries and one split of the atoms."""
    T = reference.dtype.element_ty
    blocks = tl.cdiv(B, QUERIES)
    split = (tl.program_id(0) // blocks).to(tl.int64)
    i_block = (tl.program_id(0) % blocks).to(tl.int64)
    i_query = i_block * QUERIES + index_along(QUERIES, 2 - COORD_AXIS)
    active = i_query < B
    b_curvature = tl.load(curvature + i_query, mask=active, other=0.0)
    b_level = tl.load(level + i_query, mask=active, other=0.0)
    b_constant = tl.load(constant + i_query, mask=active, other=0.0)
    b_square = tl.load(square + i_query, mask=active, other=0.0)
    if QUADRATIC == 1:
        b_quadratic = tl.load(quadratic + i_query, mask=active, other=0.0)
    i = index_along(ATOMS, 1)
    begin = split * span
    tiles = tl.cdiv(tl.minimum(span, N - begin).to(tl.int32), ATOMS)
    k = index_along(D, COORD_AXIS)
    pair = tl.zeros_like(b_level) + tl.zeros((1, ATOMS, 1), T)
    block = pair + tl.zeros_like(k).to(T)
    total, total_square, total_weighted = pair, pair, pair
    b_first, b_second = block, block
    b_dy = tl.zeros_like(i + k).to(T)  # the queries' all
    for tile in range(tiles):
        start = begin + tile * ATOMS
        exists = (i < N - start) & active
        valid = valid_atoms(log_pi, start, i, N, PRIOR)
        t = block
        pull_t, t_t, form, pull_dy, t_dy = block, block, block, block, block
        for c in range(1 if WHOLE else tl.cdiv(d, D)):
            k = c * D + index_along(D, COORD_AXIS)
            t = load_differences(
                y, reference, start, i, k, i_query, valid, active, y_stride, d, scale, offset,
                AFFINE,
            )  # fmt: skip
            if TANGENT:
                b_dy = load_atoms(dy, start, i, k, valid, dy_stride, d, 1.0, 0.0, T, False)
            p = i_query * d + k
            more = form_products(
                t, b_dy, pull, linear, quadratic, p, active & (k < d), LINEAR, QUADRATIC
            )
            pull_t += more[0]
            t_t += more[1]
            form += more[2]
            if TANGENT:
                pull_dy += more[3]
                t_dy += more[4]
        distance = tl.sum(t_t, COORD_AXIS, keep_dims=True)
        logit = tl.sum(pull_t, COORD_AXIS, keep_dims=True) - b_curvature * distance - b_level
        if PRIOR:
            logit += tl.load(log_pi + start + i, mask=exists, other=0.0)
        e = tl.where(exists, exponential(logit), 0.0)
        f = b_constant + tl.sum(form, COORD_AXIS, keep_dims=True)
        if QUADRATIC == 1:
            f += b_quadratic * distance
        if products is not None:
            f += tl.load(products + i_query * N + start + i, mask=exists, other=0.0)
        if dlog_pi is not None:
            f += tl.load(dlog_pi + start + i, mask=exists & valid, other=0.0)
        if TANGENT:
            moved = tl.sum(t_dy, COORD_AXIS, keep_dims=True)
            f += tl.sum(pull_dy, COORD_AXIS, keep_dims=True) - 2 * b_curvature * moved
        weightless = e == 0  # 0 times the infinity that an outlier leads to would be NaN
        coefficient = tl.where(weightless, 0.0, e * (f + b_square * e))
        total += coefficient
        total_weighted += e * coefficient
        more_square = coefficient * distance
        if TANGENT:
            more_square += 2 * e * moved
        total_square += tl.where(weightless, 0.0, more_square)
        if WHOLE:
            ct = coefficient * t
            b_first += ct
            if SQUARES:
                b_second += ct * t
            if TANGENT:
                b_first += e * b_dy
                if SQUARES:
                    b_second += 2 * e * b_dy * t
        p_pair = i_query * N + start + i
        if coefficients is not None:
            tl.store(coefficients + p_pair, coefficient, mask=exists)
        if weights is not None:
            tl.store(weights + p_pair, e, mask=exists)
    count = tl.full((), splits, tl.int64) * B
    out = split * B + i_query
    tl.store(totals + out, tl.sum(total, 1, keep_dims=True), mask=active)
    tl.store(totals + count + out, tl.sum(total_square, 1, keep_dims=True), mask=active)
    tl.store(totals + 2 * count + out, tl.sum(total_weighted, 1, keep_dims=True), mask=active)
    if WHOLE:
        k = index_along(D, COORD_AXIS)
        p = out * d + k
        tl.store(first + p, tl.sum(b_first, 1, keep_dims=True), mask=active & (k < d))
        if SQUARES:
            tl.store(second + p, tl.sum(b_second, 1, keep_dims=True), mask=active & (k < d))
