"""Matrix products: logits of all atoms, and sums about a centre.

x' and y' are x less alpha times the centre, and y less the centre:
    -|x - alpha y|^2/(2 sigma^2) = -(|x'|^2 - 2 alpha <x', y'> + alpha^2 |y'|^2)/(2 sigma^2)
On operands rounded to bfloat16, which moves <x', y'> by at most 2^-8 |x'| |y'|, this is a filter: it writes
what each logit is at most. For queries near the data, |x'|^2 + alpha^2 |y'|^2 of the size of d sigma^2, three
products of tf32 parts (tf32x3) are as good as differences; and so are sums about the centre. Tensor cores cut
short what they add up: a product starts from zero in every tile, and `keep`, which is 1, stops the compiler
from folding the addition of tiles, in float32, into it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_device import LOG2E, add_exactly, load_atoms


@triton.jit
def filter_logits(
    x,  # [B, d]: x less alpha times the centre, rounded
    y,  # [N, d], rows ldy apart
    centre,  # [d]
    square,  # [B]: |x'|^2
    near,  # [B], PRECISE: which queries to do
    alpha,
    sigma,
    log_pi,
    upper,  # out [B, N]: no logit is larger; PRECISE: the logits
    lower,  # out [B, tiles]: the tile's largest is no smaller
    sizes,  # out [N]: |y'|^2
    N,
    d,
    ldy,
    B,
    keep,
    scale,
    offset,
    PRECISE: tl.constexpr,
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
    chunks = tl.cdiv(d, D)
    if PRECISE:
        close = tl.load(near + q, mask=live, other=0)
        live &= close > 0
        chunks = tl.where(tl.max(close) > 0, chunks, 0)
    for c in tl.range(0, chunks, num_stages=STAGES):
        k = c * D + tl.arange(0, D)
        t = load_atoms(y, start, i, k[None, :], ldy, N, d, scale, offset, tl.float32, AFFINE)
        t -= tl.load(centre + k, mask=k < d, other=0.0)[None, :]
        size += tl.sum(t * t, 1, keep_dims=True)
        xq = tl.load(x + q * d + k[:, None], mask=live & (k < d)[:, None], other=0.0)
        if PRECISE:
            product = product * keep + tl.dot(t, xq, input_precision="tf32x3")
        else:
            product = tl.dot(t.to(xq.dtype), xq, product, input_precision="tf32")
    a = tl.load(alpha + q, mask=live, other=0.0)
    noise = tl.load(sigma + q, mask=live, other=1.0)
    own = tl.load(square + q, mask=live, other=0.0)
    half = 0.5 * LOG2E / (noise * noise)
    logit = half * (2 * a * product - own - a * a * size)
    real = live & (i < N - start)
    at = upper + q * N + start + i
    if PRIOR:
        prior = LOG2E * tl.load(log_pi + start + i, mask=i < N - start, other=0.0)
        logit += prior
    if PRECISE:
        tl.store(at, logit, mask=real)
    else:
        # 2^-8 and 2^-18 of the roundings, d 2^-23 of adding up products, d/64 2^-23 of adding up squares
        reach = tl.sqrt(own) * tl.abs(a) * tl.sqrt(size)
        error = half * (2 * reach * (0.00392 + d * 1.2e-7) + (2e-6 + d * 2e-9) * (own + a * a * size))
        if PRIOR:
            error += tl.where(prior == -float("inf"), 0.0, -1e-6 * prior)
        tl.store(at, logit + error, mask=real)
        surely = tl.max(tl.where(real, logit - error, -float("inf")), 0, keep_dims=True)
        tl.store(lower + q * tl.cdiv(N, ATOMS) + tile, surely, mask=live)
        tl.store(sizes + start + i, size, mask=(i < N - start) & (tl.program_id(0) % blocks == 0))


@triton.jit
def near_sums(
    given,  # [B, N]: logits
    top,  # [B]: the largest
    near,  # [B]: which queries to do
    y,  # [N, d], rows ldy apart
    centre,  # [d]
    sizes,  # [N]: |y'|^2
    scalars,  # out [4, splits, B], vectors: as the sweep's
    vectors,  # out [3, splits, B, d]
    N,
    d,
    ldy,
    B,
    splits,
    begin_split,  # before it are the sweep's
    span,
    keep,
    scale,
    offset,
    AFFINE: tl.constexpr,
    SPREAD: tl.constexpr,  # second is sum e |y'|^2 / d in all coordinates: only its sum counts
    D: tl.constexpr,
    ATOMS: tl.constexpr,
    QUERIES: tl.constexpr,
    STAGES: tl.constexpr,
):
    parts = tl.cdiv(d, D)
    blocks = tl.cdiv(B, QUERIES)
    k = tl.program_id(0) % parts * D + tl.arange(0, D)[None, :]
    q = (tl.program_id(0) // parts % blocks).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)[:, None]
    split = (tl.program_id(0) // parts // blocks).to(tl.int64)
    close = tl.load(near + q, mask=q < B, other=0)
    largest = tl.load(top + q, mask=q < B, other=0.0)
    origin = tl.load(centre + k, mask=k < d, other=0.0)
    begin = split * span
    tiles = tl.cdiv(tl.minimum(span, N - begin).to(tl.int32), ATOMS)
    tiles = tl.where(tl.max(close) > 0, tiles, 0)
    mass = tl.zeros((QUERIES, 1), tl.float32)
    lost = mass
    square = mass
    lost_square = mass
    spread = mass
    first = tl.zeros((QUERIES, D), tl.float32)
    second = first
    for tile in tl.range(0, tiles, num_stages=STAGES):
        start = begin + tile * ATOMS
        i = tl.arange(0, ATOMS)
        here = (i < N - start)[None, :]
        logit = tl.load(given + q * N + start + i[None, :], mask=here & (close > 0), other=-float("inf"))
        e = tl.exp2(logit - largest)
        t = load_atoms(y, start, i[:, None], k, ldy, N, d, scale, offset, tl.float32, AFFINE) - origin
        t = tl.where(i[:, None] < N - start, t, 0.0)
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
    out = (begin_split + split) * B + q
    count = tl.full((), splits, tl.int64) * B
    whole = (q < B) & (tl.program_id(0) % parts == 0)
    tl.store(scalars + out, tl.where(close > 0, largest, -float("inf")), mask=whole)
    tl.store(scalars + count + out, mass + lost, mask=whole)
    tl.store(scalars + 2 * count + out, square + lost_square, mask=whole)
    cell = (close > 0) & (k < d)
    tl.store(vectors + out * d + k, origin + tl.zeros_like(first), mask=cell)
    tl.store(vectors + (count + out) * d + k, first, mask=cell)
    tl.store(vectors + (2 * count + out) * d + k, second, mask=cell)
