"""Sums of queries near the data, and the <t, v> that they take, by matrix products about the
centre.

`keep`: as in `_triton_products`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .functions import add_exactly, load_atoms, real_atoms


@triton.jit
def near_tilts(
    v,  # [lanes, d]
    y,  # [N, d], rows ldy apart
    centre,  # [d]
    shift,  # [lanes]: <about - centre, v>
    near,  # [B]: which queries to do
    log_pi,  # [N]
    out,  # out [lanes, N]
    N,
    d,
    ldy,
    lanes,
    per_query,
    keep,
    scale,
    offset,
    PRIOR: tl.constexpr,
    AFFINE: tl.constexpr,
    D: tl.constexpr,
    ATOMS: tl.constexpr,
    QUERIES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """<y - about, v>."""
    blocks = tl.cdiv(lanes, QUERIES)
    start = (tl.program_id(0) // blocks).to(tl.int64) * ATOMS
    i = tl.arange(0, ATOMS)[:, None]
    lane = (tl.program_id(0) % blocks).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)[None, :]
    close = tl.load(near + lane // per_query, mask=lane < lanes, other=0.0)
    live = close > 0
    real = real_atoms(log_pi, start, i, N, PRIOR)
    product = tl.zeros((ATOMS, QUERIES), tl.float32)
    for c in tl.range(0, tl.where(tl.max(close) > 0, tl.cdiv(d, D), 0), num_stages=STAGES):
        k = c * D + tl.arange(0, D)
        t = load_atoms(y, start, i, k[None, :], real, ldy, d, scale, offset, tl.float32, AFFINE)
        t -= tl.load(centre + k, mask=k < d, other=0.0)[None, :]
        vq = tl.load(v + lane * d + k[:, None], mask=live & (k < d)[:, None], other=0.0)
        product = product * keep + tl.dot(t, vq, input_precision="tf32x3")
    product -= tl.load(shift + lane, mask=live, other=0.0)
    tl.store(out + lane * N + start + i, product, mask=live & (i < N - start))


@triton.jit
def near_sums(
    given,  # [B, N]: logits
    top,  # [B]: the largest
    near,  # [B]: which queries to do
    y,  # [N, d], rows ldy apart
    log_pi,  # [N]
    centre,  # [d]
    sizes,  # [N]: |y'|^2
    tilts,  # [lanes, N]: <y - about, v>
    about,  # [lanes, d]: the mean
    scalars,  # out [4, splits, lanes], vectors: as the sweep's
    vectors,  # out [3, splits, lanes, d]
    N,
    d,
    ldy,
    lanes,
    per_query,
    splits,
    begin_split,  # before it are the sweep's
    span,
    keep,
    scale,
    offset,
    MATVEC: tl.constexpr,
    PRIOR: tl.constexpr,
    AFFINE: tl.constexpr,
    SPREAD: tl.constexpr,  # second is sum e |y'|^2 / d in all coordinates: only its sum counts
    D: tl.constexpr,
    ATOMS: tl.constexpr,
    QUERIES: tl.constexpr,
    STAGES: tl.constexpr,
):
    parts = tl.cdiv(d, D)
    blocks = tl.cdiv(lanes, QUERIES)
    k = tl.program_id(0) % parts * D + tl.arange(0, D)[None, :]
    lane = (tl.program_id(0) // parts % blocks).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)[
        :, None
    ]
    q = lane // per_query
    split = (tl.program_id(0) // parts // blocks).to(tl.int64)
    close = tl.load(near + q, mask=lane < lanes, other=0)
    largest = tl.load(top + q, mask=lane < lanes, other=0.0)
    origin = tl.load(centre + k, mask=k < d, other=0.0)
    begin = split * span
    tiles = tl.cdiv(tl.minimum(span, N - begin).to(tl.int32), ATOMS)
    tiles = tl.where(tl.max(close) > 0, tiles, 0)
    mass = tl.zeros((QUERIES, 1), tl.float32)
    lost = mass
    square = mass
    lost_square = mass
    spread = mass
    tilt = mass
    first = tl.zeros((QUERIES, D), tl.float32)
    second = first
    for tile in tl.range(0, tiles, num_stages=STAGES):
        start = begin + tile * ATOMS
        i = tl.arange(0, ATOMS)
        here = (i < N - start)[None, :]
        logit = tl.load(
            given + q * N + start + i[None, :], mask=here & (close > 0), other=-float("inf")
        )
        e = tl.exp2(logit - largest)
        real = real_atoms(log_pi, start, i[:, None], N, PRIOR)
        t = load_atoms(y, start, i[:, None], k, real, ldy, d, scale, offset, tl.float32, AFFINE)
        t = tl.where(real, t - origin, 0.0)
        if MATVEC:
            p = tl.load(tilts + lane * N + start + i[None, :], mask=here & (close > 0), other=0.0)
            tilt += tl.sum(e * p, 1, keep_dims=True)
            second = second * keep + tl.dot(e * p, t, input_precision="tf32x3")
        else:
            first = first * keep + tl.dot(e, t, input_precision="tf32x3")
            if SPREAD:
                size = tl.load(sizes + start + i, mask=i < N - start, other=0.0)
                spread += tl.sum(e * size[None, :], 1, keep_dims=True)
            else:
                second = second * keep + tl.dot(e, t * t, input_precision="tf32x3")
        mass, lost = add_exactly(mass, lost, tl.sum(e, 1, keep_dims=True))
        square, lost_square = add_exactly(square, lost_square, tl.sum(e * e, 1, keep_dims=True))
    if SPREAD:
        second = tl.zeros((QUERIES, D), tl.float32) + spread / d
    cell = (close > 0) & (k < d)
    ref = origin + tl.zeros_like(first)
    out = (begin_split + split) * lanes + lane
    count = tl.full((), splits, tl.int64) * lanes
    whole = (lane < lanes) & (tl.program_id(0) % parts == 0)
    tl.store(scalars + out, tl.where(close > 0, largest, -float("inf")), mask=whole)
    tl.store(scalars + count + out, mass + lost, mask=whole)
    tl.store(scalars + 2 * count + out, square + lost_square, mask=whole)
    if MATVEC:  # about the mean, where first is nothing
        ref = tl.load(about + lane * d + k, mask=cell, other=0.0)
        second -= tilt * (ref - origin)
        tl.store(scalars + 3 * count + out, tilt, mask=whole)
    tl.store(vectors + out * d + k, ref, mask=cell)
    tl.store(vectors + (count + out) * d + k, first, mask=cell)
    tl.store(vectors + (2 * count + out) * d + k, second, mask=cell)
