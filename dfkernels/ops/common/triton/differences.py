"""Logits, or <t, v>, of every (lane, atom), by differences, kept: all of them, or those that may
matter."""

from __future__ import annotations

import triton
import triton.language as tl

from .functions import LOG2E, along, load_atoms, real_atoms


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
    """log2 pi - log2(e) |x - alpha y|^2/(2 sigma^2), or <y - about, v>; FILTERED: where it may
    matter."""
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
    for tile in range(tiles):
        start = begin + tile * ATOMS
        here = i < N - start
        real = real_atoms(log_pi, start, i, N, PRIOR)
        at_out = out + lane * N + start + i
        chunks = tl.cdiv(d, D)
        if FILTERED:
            bound = tl.load(bounds + query * N + start + i, mask=here & live, other=-float("inf"))
            chunks = tl.where(
                tl.max(((bound >= least) | (bound != bound)).to(tl.int32)) > 0, chunks, 0
            )
        total = tl.zeros((LANES, ATOMS, D), T)
        for c in range(chunks):
            k = c * D + along(D, 2)
            cell = live & (k < d)
            at = load_atoms(y, start, i, k, real, ldy, d, scale, offset, T, AFFINE)
            xq = tl.load(x + row * d + k, mask=cell, other=0.0)
            if PROJECT:
                total += (at - xq) * tl.load(v + lane * d + k, mask=cell, other=0.0)
            else:
                u = xq - a * at
                total += u * u
        value = tl.sum(total, 2, keep_dims=True)
        if not PROJECT:
            noise = tl.load(sigma + query, mask=live, other=1.0)
            wild = ~(value < float("inf"))
            value *= -0.5 * LOG2E / (noise * noise)
            if (
                tl.max(wild.to(tl.int32)) > 0
            ):  # far atoms, whose squares overflow, or what is no number: then nan
                odd = tl.zeros((LANES, ATOMS, 1), T)
                for c in range(chunks):
                    k = c * D + along(D, 2)
                    at = load_atoms(y, start, i, k, real, ldy, d, scale, offset, T, AFFINE)
                    xq = tl.load(x + row * d + k, mask=live & (k < d), other=0.0)
                    odd += tl.sum(0.0 * xq + 0.0 * at, 2, keep_dims=True)
                value += odd
            if PRIOR:
                value += LOG2E * tl.load(log_pi + start + i, mask=here, other=0.0)
        tl.store(at_out, value, mask=live & here & (chunks > 0))
