"""Bounds on logits from the codes of an index, for `kept_atoms`.

The first level's sums are float32, one coordinate after another. Those of the tail are exact: a
query comes as integers of 32 bits, four digits to base 256, and tensor cores add up products of
8-bit integers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _bounds(c, q, i, here, coefs, size, rest, shift, prior, Q):
    """Middle and upper end of the logits of atoms i for queries q: struct Bound in
    csrc/certified/screen_kernels.h."""
    of_query = coefs + q * 6
    alpha = tl.load(of_query, mask=q < Q, other=0.0)
    reach = tl.load(of_query + 3, mask=q < Q, other=0.0)
    along = tl.load(of_query + 4, mask=q < Q, other=0.0)
    code = tl.load(of_query + 5, mask=q < Q, other=0.0)
    s = tl.load(size + i, mask=here, other=0.0)
    wrong = tl.load(shift + i, mask=here, other=0.0)
    width = reach * tl.load(rest + i, mask=here, other=0.0) + along * wrong + code * (s + wrong)
    width *= tl.abs(alpha)
    square = tl.load(of_query + 1, mask=q < Q, other=0.0) * (s * s)
    logit = alpha * c - square
    sizes = tl.abs(alpha * c) + square + width
    p = tl.load(of_query + 2, mask=q < Q, other=1.0) * tl.load(prior + i, mask=here, other=0.0)
    logit += p
    sizes += tl.where(p > -float("inf"), tl.abs(p), 0.0)
    return (
        logit,
        logit + width + 1.9073486e-6 * sizes,
    )  # 2^-19: 32 roundings, of what is stored and of these


@triton.jit
def first_level(
    codes,  # int16 [tiles, K, TILE]
    scale,  # [N]; size, rest, shift, prior as well
    query,  # [Q, K]
    coefs,  # [Q, 6]: alpha, alpha^2 / 2, sigma^2, reach, along, code
    size,
    rest,
    shift,
    prior,
    product,  # out [Q, N]: of codes and query
    mid,  # out [Q, N]
    up,  # out [Q, N]
    Q,
    N,
    K: tl.constexpr,
    TILE: tl.constexpr,
    ATOMS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    blocks = tl.cdiv(Q, QUERIES)
    begin = (tl.program_id(0) // blocks).to(tl.int64) * ATOMS
    q = (tl.program_id(0) % blocks).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)[:, None]
    j = tl.arange(0, ATOMS)
    column = codes + begin * K + j // TILE * (TILE * K) + j % TILE
    c = tl.zeros((QUERIES, ATOMS), tl.float32)
    for k in tl.static_range(K):
        code = tl.load(column + k * TILE, mask=j < N - begin, other=0).to(tl.float32)
        c += tl.load(query + q * K + k, mask=q < Q, other=0.0) * code[None, :]
    i = begin + j[None, :]
    c *= tl.load(scale + i, mask=i < N, other=0.0)
    logit, end = _bounds(c, q, i, i < N, coefs, size, rest, shift, prior, Q)
    real = (q < Q) & (i < N)
    tl.store(product + q * N + i, c, mask=real)
    tl.store(mid + q * N + i, logit, mask=real)
    tl.store(up + q * N + i, end, mask=real)


@triton.jit
def add_tail(
    codes,  # int8 [N, n]
    scale,
    digits,  # int8 [Q, 4, n]: of the query in units of `unit`, the last digit first
    unit,  # [Q]
    coefs,
    size,
    rest,
    shift,
    prior,
    below,  # [Q]: atoms with a smaller `up` are left out
    product,  # [Q, N]: of the first level
    mid,  # out, of the atoms that are left
    up,  # out as well
    Q,
    N,
    n,
    ATOMS: tl.constexpr,
    QUERIES: tl.constexpr,
    D: tl.constexpr,
    SPAN: tl.constexpr,
):
    blocks = tl.cdiv(Q, QUERIES)
    block = (tl.program_id(0) % blocks).to(tl.int64)
    atom = (tl.program_id(0) // blocks).to(tl.int64) * ATOMS + tl.arange(0, ATOMS)
    i = atom[:, None]
    q = block * QUERIES + tl.arange(0, QUERIES)[None, :]
    real = (q < Q) & (i < N)
    least = tl.load(below + q, mask=q < Q, other=0.0)
    left = real & ~(tl.load(up + q * N + i, mask=real, other=0.0) < least)  # nan is left
    asked = tl.max(left.to(tl.int32), 1)
    row = block * (4 * QUERIES) + tl.arange(0, 4 * QUERIES)
    power = 8 * tl.arange(0, 4).to(tl.int64)[None, None, :]
    exact = tl.zeros((ATOMS, QUERIES), tl.int64)
    length = tl.where(tl.max(asked, 0) > 0, n, 0)
    for begin in range(0, length, SPAN):
        sums = tl.zeros((ATOMS, 4 * QUERIES), tl.int32)
        for k0 in tl.range(begin, tl.minimum(begin + SPAN, length), D, num_stages=3):
            k = k0 + tl.arange(0, D)[None, :]
            y = tl.load(codes + i * n + k, mask=(asked > 0)[:, None] & (k < n), other=0)
            v = tl.load(
                digits + row[:, None] * n + k, mask=(row < 4 * Q)[:, None] & (k < n), other=0
            )
            sums = tl.dot(y, tl.trans(v), sums, out_dtype=tl.int32)
        exact += tl.sum(tl.reshape(sums, (ATOMS, QUERIES, 4)).to(tl.int64) << power, 2)
    c = tl.load(product + q * N + i, mask=left, other=0.0)
    factor = tl.load(unit + q, mask=q < Q, other=0.0) * tl.load(scale + i, mask=i < N, other=0.0)
    c += exact.to(tl.float32) * factor
    logit, end = _bounds(c, q, i, i < N, coefs, size, rest, shift, prior, Q)
    tl.store(mid + q * N + i, logit, mask=left)
    tl.store(up + q * N + i, end, mask=left)
