# pyrefly: ignore-errors
# (Triton's language has no types.)
"""Triton kernels that bound logits from the codes of an index, for ``select_atoms``.

Products with the coarse codes are summed in float32, one axis after another. Those with the fine
codes are exact: a query comes as integers of 32 bits, four digits to base 256, and tensor cores add
up products of 8-bit integers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import rounding

FLOAT_BOUND = tl.constexpr(rounding.FLOAT_BOUND)


@triton.jit
def _bounds(
    b_product,  # [QUERIES, ATOMS]
    q,  # queries, [QUERIES, 1] or [1, QUERIES]
    i,  # atoms, across
    real,  # mask of the atoms
    p_coefficients,
    p_atom_norm,
    p_remainder_norm,
    p_axis_error,
    p_log_prior,
    Q,
):
    """Estimate and upper bound of the logits of atoms i for queries q: `Queries.bounds`."""
    p_q = p_coefficients + q * 6
    alpha = tl.load(p_q, mask=q < Q, other=0.0)
    half_alpha_square = tl.load(p_q + 1, mask=q < Q, other=0.0)
    variance = tl.load(p_q + 2, mask=q < Q, other=1.0)
    query_remainder = tl.load(p_q + 3, mask=q < Q, other=0.0)
    query_on_axes = tl.load(p_q + 4, mask=q < Q, other=0.0)
    code_error = tl.load(p_q + 5, mask=q < Q, other=0.0)
    b_norm = tl.load(p_atom_norm + i, mask=real, other=0.0)
    b_axis_error = tl.load(p_axis_error + i, mask=real, other=0.0)
    b_remainder = tl.load(p_remainder_norm + i, mask=real, other=0.0)
    b_error = query_remainder * b_remainder + query_on_axes * b_axis_error
    b_error += code_error * (b_norm + b_axis_error)
    b_error *= tl.abs(alpha)
    b_half_square = half_alpha_square * (b_norm * b_norm)
    b_logit = alpha * b_product - b_half_square
    b_sizes = tl.abs(alpha * b_product) + b_half_square + b_error
    b_prior = variance * tl.load(p_log_prior + i, mask=real, other=0.0)
    b_logit += b_prior
    b_sizes += tl.where(b_prior > -float("inf"), tl.abs(b_prior), 0.0)
    return b_logit, b_logit + b_error + FLOAT_BOUND * b_sizes


@triton.jit
def bound_from_coarse(
    p_codes,  # int16 [tiles, K, TILE]
    p_scale,  # [N], as atom_norm, remainder_norm, axis_error and log_prior
    p_query,  # [Q, K], V z times axis_scale
    p_coefficients,  # [Q, 6]: alpha, alpha^2 / 2, sigma^2, then those of ProductError
    p_atom_norm,
    p_remainder_norm,
    p_axis_error,
    p_log_prior,
    p_product,  # out [Q, N]: approximate <z, t>
    p_estimate,  # out [Q, N]
    p_upper,  # out [Q, N]
    Q,
    N,
    K: tl.constexpr,
    TILE: tl.constexpr,
    ATOMS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """The coarse level, for ATOMS atoms and a group of QUERIES queries."""
    groups = tl.cdiv(Q, QUERIES)
    i_begin = (tl.program_id(0) // groups).to(tl.int64) * ATOMS
    q = (tl.program_id(0) % groups).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)[:, None]
    j = tl.arange(0, ATOMS)
    p_column = p_codes + i_begin * K + j // TILE * (TILE * K) + j % TILE
    b_product = tl.zeros((QUERIES, ATOMS), tl.float32)
    for k in tl.static_range(K):
        b_code = tl.load(p_column + k * TILE, mask=j < N - i_begin, other=0).to(tl.float32)
        b_product += tl.load(p_query + q * K + k, mask=q < Q, other=0.0) * b_code[None, :]
    i = i_begin + j[None, :]
    b_product *= tl.load(p_scale + i, mask=i < N, other=0.0)
    b_estimate, b_upper = _bounds(
        b_product, q, i, i < N, p_coefficients,
        p_atom_norm, p_remainder_norm, p_axis_error, p_log_prior, Q,
    )  # fmt: skip
    real = (q < Q) & (i < N)
    tl.store(p_product + q * N + i, b_product, mask=real)
    tl.store(p_estimate + q * N + i, b_estimate, mask=real)
    tl.store(p_upper + q * N + i, b_upper, mask=real)


@triton.jit
def bound_from_fine(
    p_codes,  # int8 [N, n]
    p_scale,  # [N], as atom_norm, remainder_norm, axis_error and log_prior
    p_digits,  # int8 [Q, 4, n]: the queries in units of `unit`, the last digit first
    p_unit,  # [Q]
    p_coefficients,
    p_atom_norm,
    p_remainder_norm,
    p_axis_error,
    p_log_prior,
    p_threshold,  # [Q]: atoms with a smaller `upper` are no candidates
    p_product,  # [Q, N]: from the coarse level
    p_estimate,  # out, for the candidates
    p_upper,  # in and out, for the candidates
    Q,
    N,
    n,
    ATOMS: tl.constexpr,
    QUERIES: tl.constexpr,
    D: tl.constexpr,
    SPAN: tl.constexpr,
):
    """The fine level, for those of ATOMS atoms that are candidates of a group of queries."""
    groups = tl.cdiv(Q, QUERIES)
    i_group = (tl.program_id(0) % groups).to(tl.int64)
    b_atom = (tl.program_id(0) // groups).to(tl.int64) * ATOMS + tl.arange(0, ATOMS)
    i = b_atom[:, None]
    q = i_group * QUERIES + tl.arange(0, QUERIES)[None, :]
    real = (q < Q) & (i < N)
    b_threshold = tl.load(p_threshold + q, mask=q < Q, other=0.0)
    b_upper = tl.load(p_upper + q * N + i, mask=real, other=0.0)
    candidate = real & ~(b_upper < b_threshold)  # nan is a candidate
    b_needed = tl.max(candidate.to(tl.int32), 1)
    row = i_group * (4 * QUERIES) + tl.arange(0, 4 * QUERIES)
    power = 8 * tl.arange(0, 4).to(tl.int64)[None, None, :]
    b_exact = tl.zeros((ATOMS, QUERIES), tl.int64)
    length = tl.where(tl.max(b_needed, 0) > 0, n, 0)
    for begin in range(0, length, SPAN):
        b_sums = tl.zeros((ATOMS, 4 * QUERIES), tl.int32)
        for k0 in tl.range(begin, tl.minimum(begin + SPAN, length), D, num_stages=3):
            k = k0 + tl.arange(0, D)[None, :]
            b_y = tl.load(p_codes + i * n + k, mask=(b_needed > 0)[:, None] & (k < n), other=0)
            digit_mask = (row < 4 * Q)[:, None] & (k < n)
            b_z = tl.load(p_digits + row[:, None] * n + k, mask=digit_mask, other=0)
            b_sums = tl.dot(b_y, tl.trans(b_z), b_sums, out_dtype=tl.int32)
        b_exact += tl.sum(tl.reshape(b_sums, (ATOMS, QUERIES, 4)).to(tl.int64) << power, 2)
    b_product = tl.load(p_product + q * N + i, mask=candidate, other=0.0)
    b_unit = tl.load(p_unit + q, mask=q < Q, other=0.0)
    b_product += b_exact.to(tl.float32) * (b_unit * tl.load(p_scale + i, mask=i < N, other=0.0))
    b_estimate, b_upper = _bounds(
        b_product, q, i, i < N, p_coefficients,
        p_atom_norm, p_remainder_norm, p_axis_error, p_log_prior, Q,
    )  # fmt: skip
    tl.store(p_estimate + q * N + i, b_estimate, mask=candidate)
    tl.store(p_upper + q * N + i, b_upper, mask=candidate)


@triton.jit
def weigh_dropped(
    p_upper,  # [Q, N]
    p_threshold,  # [Q]: atoms with a smaller `upper` are dropped
    p_reached,  # [Q], double: a lower bound of the k-th largest logit
    p_variance,  # [Q], double
    p_takes_all,  # bool [Q]
    p_stays,  # out, bool [Q, N]: not dropped; nothing where all are taken
    p_dropped,  # out, double [Q, blocks of ATOMS]: sum of e^((upper - reached) / sigma^2)
    N,
    ATOMS: tl.constexpr,
):
    """What the dropped atoms may weigh, and which ones stay, for ATOMS atoms and one query."""
    blocks = tl.cdiv(N, ATOMS)
    q = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * ATOMS + tl.arange(0, ATOMS)
    b_upper = tl.load(p_upper + q * N + i, mask=i < N, other=0.0)
    gone = (b_upper < tl.load(p_threshold + q)) & (i < N)
    below = b_upper.to(tl.float64) - tl.load(p_reached + q)
    below = tl.where(gone, below / tl.load(p_variance + q), 0.0)
    stays = (gone == 0) & (tl.load(p_takes_all + q) == 0)
    tl.store(p_stays + q * N + i, stays, mask=i < N)
    tl.store(p_dropped + tl.program_id(0), tl.sum(tl.where(gone, tl.exp(below), 0.0)))
