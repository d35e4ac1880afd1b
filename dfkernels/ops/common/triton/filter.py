"""Logits of all atoms by matrix products.

x' and y' are x less alpha times the centre, and y less the centre:
    -|x - alpha y|^2/(2 sigma^2) = -(|x'|^2 - 2 alpha <x', y'> + alpha^2 |y'|^2)/(2 sigma^2)
On operands rounded to bfloat16, which moves <x', y'> by at most 2^-8 |x'| |y'|, this is a filter:
it writes what each logit is at most. For queries near the data, |x'|^2 + alpha^2 |y'|^2 of the size
of d sigma^2, three products of tf32 parts (tf32x3) are as good as differences. Tensor cores cut
short what they add up: a product starts from zero in every tile, and `keep`, which is 1, stops the
compiler from folding the addition of tiles, in float32, into it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .functions import LOG2E, load_atoms, real_atoms


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
    weighs = real_atoms(log_pi, start, i, N, PRIOR)
    for c in tl.range(0, chunks, num_stages=STAGES):
        k = c * D + tl.arange(0, D)
        t = load_atoms(y, start, i, k[None, :], weighs, ldy, d, scale, offset, tl.float32, AFFINE)
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
        # 2^-8 and 2^-18 of the roundings, d 2^-23 of adding up products, d/64 2^-23 of adding up
        # squares
        reach = tl.sqrt(own) * tl.abs(a) * tl.sqrt(size)
        error = half * (
            2 * reach * (0.00392 + d * 1.2e-7) + (2e-6 + d * 2e-9) * (own + a * a * size)
        )
        if PRIOR:
            error += tl.where(prior == -float("inf"), 0.0, -1e-6 * prior)
        tl.store(at, logit + error, mask=real)
        least = logit - error  # nan where squares overflow: such atoms are computed anew
        surely = tl.max(tl.where(real & (least == least), least, -float("inf")), 0, keep_dims=True)
        tl.store(lower + q * tl.cdiv(N, ATOMS) + tile, surely, mask=live)
        size = tl.where(weighs, size, 0.0)  # of the others it is |centre|^2
        tl.store(sizes + start + i, size, mask=(i < N - start) & (tl.program_id(0) % blocks == 0))
