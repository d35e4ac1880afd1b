"""Logits, or <t, v>, of every (lane, atom), kept; and a filter that spares most of them.

The filter takes logits by a matrix product on rounded operands, x and y less a centre c,
    -|x - alpha y|^2/(2 sigma^2) = -(|x'|^2 - 2 alpha <x', y'> + alpha^2 |y'|^2)/(2 sigma^2)
and writes what each is at most. Rounding to bfloat16 moves <x', y'> by at most 2^-8 |x'| |y'|. Atoms that may
carry weight by that get their logits anew, by differences.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_sweep import LOG2E, along, load_atoms


@triton.jit
def rows_sum(
    x,  # [B, d], or about [lanes, d]
    y,  # [N, d], rows ldy apart
    v,  # [lanes, d]
    alpha,
    sigma,
    log_pi,
    bounds,  # [B, N]: no logit is larger; may be out
    floor,  # [B]
    out,  # out [lanes, N]
    N,
    d,
    ldy,
    lanes,
    per_query,
    gap,
    scale,
    offset,
    PROJECT: tl.constexpr,
    FILTERED: tl.constexpr,
    PRIOR: tl.constexpr,
    AFFINE: tl.constexpr,
    D: tl.constexpr,
    ATOMS: tl.constexpr,
    LANES: tl.constexpr,
    STRIP: tl.constexpr,  # tiles of a program
):
    """log2 pi - log2(e) |x - alpha y|^2/(2 sigma^2), or <y - about, v>; FILTERED: of atoms that may matter."""
    T = x.dtype.element_ty
    blocks = tl.cdiv(lanes, LANES)
    begin = (tl.program_id(0) // blocks).to(tl.int64) * ATOMS * STRIP
    lane = (tl.program_id(0) % blocks).to(tl.int64) * LANES + along(LANES, 0)
    live = lane < lanes
    query = lane // per_query
    row = lane if PROJECT else query  # of x
    a = tl.load(alpha + query, mask=live, other=0.0)
    i = along(ATOMS, 1)
    tiles = tl.cdiv(tl.minimum(STRIP * ATOMS, N - begin).to(tl.int32), ATOMS)
    if FILTERED:
        least = tl.load(floor + query, mask=live, other=float("inf")) - gap
        n = begin + along(STRIP * ATOMS, 1)
        ahead = tl.load(bounds + query * N + n, mask=(n < N) & live, other=-float("inf"))
        tiles = tl.where(tl.max(((ahead >= least) | (ahead != ahead)).to(tl.int32)) > 0, tiles, 0)
    for tile in range(0, tiles):
        start = begin + tile * ATOMS
        here = i < N - start
        at_out = out + lane * N + start + i
        chunks = tl.cdiv(d, D)
        if FILTERED:
            bound = tl.load(bounds + query * N + start + i, mask=here & live, other=-float("inf"))
            chunks = tl.where(tl.max(((bound >= least) | (bound != bound)).to(tl.int32)) > 0, chunks, 0)
        total = tl.zeros((LANES, ATOMS, D), T)
        for c in range(0, chunks):
            k = c * D + along(D, 2)
            cell = live & (k < d)
            at = load_atoms(y, start, i, k, ldy, N, d, scale, offset, T, AFFINE)
            xq = tl.load(x + row * d + k, mask=cell, other=0.0)
            if PROJECT:
                total += (at - xq) * tl.load(v + lane * d + k, mask=cell, other=0.0)
            else:
                u = xq - a * at
                total += u * u
        value = tl.sum(total, 2, keep_dims=True)
        if not PROJECT:
            noise = tl.load(sigma + query, mask=live, other=1.0)
            infinite = value * 0.0  # nan where a distance is not finite
            value = -0.5 * LOG2E / (noise * noise) * value + infinite
            if PRIOR:
                value += LOG2E * tl.load(log_pi + start + i, mask=here, other=0.0)
        tl.store(at_out, value, mask=live & here & (chunks > 0))


@triton.jit
def filter_logits(
    x,  # [B, d]: x less alpha times the centre, rounded
    y,  # [N, d], rows ldy apart
    centre,  # [d]
    square,  # [B]: |x'|^2
    alpha,
    sigma,
    log_pi,
    upper,  # out [B, N]: no logit is larger
    lower,  # out [B, tiles]: the tile's largest is no smaller
    N,
    d,
    ldy,
    B,
    scale,
    offset,
    PRIOR: tl.constexpr,
    AFFINE: tl.constexpr,
    D: tl.constexpr,
    ATOMS: tl.constexpr,
    QUERIES: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks = tl.cdiv(B, QUERIES)
    tile = (tl.program_id(0) // blocks).to(tl.int64)
    start = tile * ATOMS
    i = tl.arange(0, ATOMS)[:, None]
    q = (tl.program_id(0) % blocks).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)[None, :]
    live = q < B
    product = tl.zeros((ATOMS, QUERIES), tl.float32)
    size = tl.zeros((ATOMS, 1), tl.float32)
    for c in tl.range(0, tl.cdiv(d, D), num_stages=STAGES):
        k = c * D + tl.arange(0, D)
        t = load_atoms(y, start, i, k[None, :], ldy, N, d, scale, offset, tl.float32, AFFINE)
        t -= tl.load(centre + k, mask=k < d, other=0.0)[None, :]
        size += tl.sum(t * t, 1, keep_dims=True)
        xq = tl.load(x + q * d + k[:, None], mask=live & (k < d)[:, None], other=0.0)
        product = tl.dot(t.to(xq.dtype), xq, product, input_precision="tf32")
    a = tl.load(alpha + q, mask=live, other=0.0)
    noise = tl.load(sigma + q, mask=live, other=1.0)
    own = tl.load(square + q, mask=live, other=0.0)
    half = 0.5 * LOG2E / (noise * noise)
    logit = half * (2 * a * product - own - a * a * size)
    reach = tl.sqrt(own) * tl.abs(a) * tl.sqrt(size)
    # 2^-8 and 2^-18 of the roundings, d 2^-23 of adding up products, d/64 2^-23 of adding up squares
    error = half * (2 * reach * (0.00392 + d * 1.2e-7) + (2e-6 + d * 2e-9) * (own + a * a * size))
    if PRIOR:
        prior = LOG2E * tl.load(log_pi + start + i, mask=i < N - start, other=0.0)
        logit += prior
        error += tl.where(prior == -float("inf"), 0.0, -1e-6 * prior)
    real = live & (i < N - start)
    tl.store(upper + q * N + start + i, logit + error, mask=real)
    surely = tl.max(tl.where(real, logit - error, -float("inf")), 0, keep_dims=True)
    tl.store(lower + q * tl.cdiv(N, ATOMS) + tile, surely, mask=live)
