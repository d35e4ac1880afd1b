"""Sums over the coordinates of every (lane, atom), kept: for d beyond what a sweep holds in registers."""

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
    out,  # out [lanes, N]
    N,
    d,
    ldy,
    lanes,
    per_query,
    scale,
    offset,
    PROJECT: tl.constexpr,
    PRIOR: tl.constexpr,
    AFFINE: tl.constexpr,
    D: tl.constexpr,
    ATOMS: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """log2 pi - log2(e) |x - alpha y|^2/(2 sigma^2), or <y - about, v>."""
    T = x.dtype.element_ty
    blocks = tl.cdiv(lanes, LANES)
    start = (tl.program_id(0) // blocks).to(tl.int64) * ATOMS
    lane = (tl.program_id(0) % blocks).to(tl.int64) * LANES + along(LANES, 0)
    live = lane < lanes
    i = along(ATOMS, 1)
    here = i < N - start
    query = lane if PROJECT else lane // per_query
    a = tl.load(alpha + lane // per_query, mask=live, other=0.0)
    total = tl.zeros((LANES, ATOMS, D), T)
    for c in tl.range(0, tl.cdiv(d, D), num_stages=STAGES):
        k = c * D + along(D, 2)
        cell = live & (k < d)
        at = load_atoms(y, start, i, k, ldy, N, d, scale, offset, T, AFFINE)
        xq = tl.load(x + query * d + k, mask=cell, other=0.0)
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
    tl.store(out + lane * N + start + i, value, mask=live & here)
