# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""One pass over the atoms that leaves nothing of size [B, N]: logits, their exponentials and the
moments, tile by tile, relative to the largest logit so far.

With x' = x - alpha centre and t = y - centre,

    logit = log2 pi + log2(e) (alpha <x', t>/sigma^2 - alpha^2 |t|^2/(2 sigma^2))

lacks -|x'|^2/(2 sigma^2), which all atoms share: it is large at high noise, and rounding would cost
every weight as many digits. It is added to log_prob at the end, in double (`common`).

KIND, one of "log_prob", "posterior", "matvec" and "diagonal", says which sums are taken.

`fused_moments_kernel` forms its products on tensor cores, of three bfloat16 parts of every float32:
the six largest of nine, whose sum is that of float32. `small_moments_kernel` is for a few
coordinates and takes a query per thread. `bound_tiles_kernel` bounds the logits by one product, for
the queries that need differences: which of them, fused.py says.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .functions import add_compensated, index_along
from .parts import split_parts


@triton.jit
def six_products(a, b, c, p, q, r):
    """(a + b + c) @ (p + q + r) in float32, but for products of 2^-24 and less; the small ones
    first, from zero: tensor cores cut off when they add."""
    total = tl.dot(c, p, input_precision="ieee")
    total = tl.dot(b, q, total, input_precision="ieee")
    total = tl.dot(a, r, total, input_precision="ieee")
    total = tl.dot(b, p, total, input_precision="ieee")
    total = tl.dot(a, q, total, input_precision="ieee")
    return tl.dot(a, p, total, input_precision="ieee")


@triton.jit
def load_parts(p_parts, count, mask=None):
    """The three parts that lie count apart."""
    other = None if mask is None else 0.0
    high = tl.load(p_parts, mask=mask, other=other)
    middle = tl.load(p_parts + count, mask=mask, other=other)
    return high, middle, tl.load(p_parts + 2 * count, mask=mask, other=other)


@triton.jit
def raised(max_logit, logit, AXIS: tl.constexpr):
    """(the larger max_logit, e of the tile, the factor `down` of all older weights)."""
    new = tl.maximum(max_logit, tl.max(logit, AXIS, keep_dims=True))
    safe = tl.where(new == -float("inf"), 0.0, new)
    return new, tl.exp2(logit - safe), tl.exp2(max_logit - safe)


@triton.jit
def add_weights(total, lost, square_total, square_lost, e, down, AXIS: tl.constexpr):
    """Adds the tile's e and e^2 to both sums of weights and to what rounding has lost of them."""
    total, lost = add_compensated(total * down, lost * down, tl.sum(e, AXIS, keep_dims=True))
    square = down * down
    square_total, square_lost = add_compensated(
        square_total * square, square_lost * square, tl.sum(e * e, AXIS, keep_dims=True)
    )
    return total, lost, square_total, square_lost


@triton.jit
def fused_moments_kernel(
    q,  # [3, B, D] bfloat16: parts of log2(e) alpha/sigma^2 x'
    v,  # [3, targets, D] bfloat16: parts of v, or None
    y,  # [3, rows, D] bfloat16: parts of t; "diagonal": [6, rows, D], and those of t * t
    weights,  # [rows, 2]: |t|^2, log2 pi
    half,  # [B]: log2(e) alpha^2/(2 sigma^2)
    by_products,  # [B]: 1 for the queries that are served here
    centre,  # [d]
    scalars,  # out [4, splits, targets] and
    vectors,  # out [3, splits, targets, d], as those of the sweep; "log_prob": None
    B,
    rows,  # of y: a multiple of ATOMS
    d,
    targets,
    vectors_per_query,
    splits,
    begin_split,  # the splits before it are the sweep's
    span,  # atoms of a split, a multiple of ATOMS
    KIND: tl.constexpr,
    BIASED: tl.constexpr,  # some log2 pi is not 0
    D: tl.constexpr,
    ATOMS: tl.constexpr,
    TARGETS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """sum e, sum e^2, sum e t, and by KIND sum e |t|^2, sum e <t, v> t or sum e t * t, of TARGETS
    targets in one split."""
    blocks = tl.cdiv(targets, TARGETS)
    split = (tl.program_id(0) // blocks).to(tl.int64)
    i_target = (tl.program_id(0) % blocks).to(tl.int64) * TARGETS + tl.arange(0, TARGETS)[:, None]
    i_query = i_target // vectors_per_query
    exists = i_target < targets
    active = tl.load(by_products + i_query, mask=exists, other=0) > 0
    k = tl.arange(0, D)[None, :]
    i = tl.arange(0, ATOMS)[:, None]
    q_count = tl.full((), B, tl.int64) * D
    q0, q1, q2 = load_parts(q + i_query * D + k, q_count, active)
    if KIND == "matvec":
        v_count = tl.full((), targets, tl.int64) * D
        v0, v1, v2 = load_parts(v + i_target * D + k, v_count, active)
    b_half = tl.load(half + i_query, mask=active, other=0.0)
    max_logit = tl.full((TARGETS, 1), -float("inf"), tl.float32)
    total = tl.zeros((TARGETS, 1), tl.float32)
    lost, square_total, square_lost, more, more_lost = total, total, total, total, total
    first = tl.zeros((TARGETS, D), tl.float32)
    second = first
    begin = split * span
    tiles = tl.cdiv(tl.minimum(span, rows - begin).to(tl.int32), ATOMS)
    tiles = tl.where(tl.max(active.to(tl.int32)) > 0, tiles, 0)
    y_count = tl.full((), rows, tl.int64) * D
    n = tl.arange(0, ATOMS)[None, :]
    for tile in tl.range(0, tiles, num_stages=STAGES):
        start = begin + tile * ATOMS
        p_y = y + start * D + (i * D + k)
        y0, y1, y2 = load_parts(p_y, y_count)
        y_square = tl.load(weights + 2 * start + 2 * n)
        logit = six_products(q0, q1, q2, y0.T, y1.T, y2.T) - b_half * y_square
        if BIASED:
            logit += tl.load(weights + 2 * start + (2 * n + 1))
        max_logit, e, down = raised(max_logit, logit, 1)
        total, lost, square_total, square_lost = add_weights(
            total, lost, square_total, square_lost, e, down, 1
        )
        if KIND != "log_prob":
            if KIND == "matvec":
                projection = six_products(v0, v1, v2, y0.T, y1.T, y2.T)
                tilted = tl.where(e > 0, e * projection, 0.0)
                here = tl.sum(tilted, 1, keep_dims=True)
                f0, f1, f2 = split_parts(tilted)
                second = add_products(second, down, six_products(f0, f1, f2, y0, y1, y2))
            else:
                here = tl.sum(e * y_square, 1, keep_dims=True)
            more, more_lost = add_compensated(more * down, more_lost * down, here)
            e0, e1, e2 = split_parts(e)
            first = add_products(first, down, six_products(e0, e1, e2, y0, y1, y2))
            if KIND == "diagonal":
                s0, s1, s2 = load_parts(p_y + 3 * y_count, y_count)
                second = add_products(second, down, six_products(e0, e1, e2, s0, s1, s2))
    out = (begin_split + split) * targets + i_target
    count = tl.full((), splits, tl.int64) * targets
    tl.store(scalars + out, tl.where(active, max_logit, -float("inf")), mask=exists)
    tl.store(scalars + count + out, total + lost, mask=exists)
    tl.store(scalars + 2 * count + out, square_total + square_lost, mask=exists)
    if KIND != "log_prob":
        more += more_lost
        if KIND == "matvec":
            tl.store(scalars + 3 * count + out, more, mask=exists)
        elif KIND == "posterior":
            second = first * 0.0 + more / d  # its sum over the coordinates counts
        mask = active & (k < d)
        b_centre = tl.load(centre + k, mask=k < d, other=0.0) + first * 0.0
        tl.store(vectors + out * d + k, b_centre, mask=mask)
        tl.store(vectors + (count + out) * d + k, first, mask=mask)
        tl.store(vectors + (2 * count + out) * d + k, second, mask=mask)


@triton.jit
def add_products(total, down, products):
    """down total + products, in float32: not within the product, where tensor cores would cut off
    what they add."""
    return tl.fma(total, down + tl.zeros_like(total), products)


@triton.jit
def two_numbers(pair):
    """Two float32 that lie side by side, from one load of 64 bits."""
    low = pair.to(tl.int32).to(tl.float32, bitcast=True)
    return low, (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def small_moments_kernel(
    q,  # [B, D]: log2(e) alpha/sigma^2 x'
    v,  # [targets, D], or None
    y,  # [rows, D/2]: t, two float32 in an int64
    weights,  # [rows]: |t|^2 and log2 pi, two float32 in an int64
    half,  # [B]
    by_products,  # [B]
    centre,  # [d]
    scalars,  # out, as those of `fused_moments_kernel`
    vectors,
    B,
    rows,
    d,
    targets,
    vectors_per_query,
    splits,
    begin_split,
    span,
    KIND: tl.constexpr,
    BIASED: tl.constexpr,
    D: tl.constexpr,
    ATOMS: tl.constexpr,
    TARGETS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`fused_moments_kernel` without tensor cores: a thread has whole targets, and every sum stays
    inside it."""
    blocks = tl.cdiv(targets, TARGETS)
    split = (tl.program_id(0) // blocks).to(tl.int64)
    i_target = (tl.program_id(0) % blocks).to(tl.int64) * TARGETS + index_along(TARGETS, 2)
    i_query = i_target // vectors_per_query
    exists = i_target < targets
    active = tl.load(by_products + i_query, mask=exists, other=0) > 0
    k = index_along(D // 2, 0)
    i = index_along(ATOMS, 1)
    q0 = tl.load(q + i_query * D + 2 * k, mask=active, other=0.0)
    q1 = tl.load(q + i_query * D + 2 * k + 1, mask=active, other=0.0)
    if KIND == "matvec":
        v0 = tl.load(v + i_target * D + 2 * k, mask=active, other=0.0)
        v1 = tl.load(v + i_target * D + 2 * k + 1, mask=active, other=0.0)
    b_half = tl.load(half + i_query, mask=active, other=0.0)
    max_logit = tl.full((1, 1, TARGETS), -float("inf"), tl.float32)
    total = tl.zeros((1, 1, TARGETS), tl.float32)
    lost, square_total, square_lost, more, more_lost = total, total, total, total, total
    first0 = tl.zeros((D // 2, 1, TARGETS), tl.float32)
    first1, second0, second1 = first0, first0, first0
    begin = split * span
    tiles = tl.cdiv(tl.minimum(span, rows - begin).to(tl.int32), ATOMS)
    tiles = tl.where(tl.max(active.to(tl.int32)) > 0, tiles, 0)
    # hides from Triton that atoms are contiguous: it would spread them over threads
    apart = tl.num_programs(1)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        start = begin + tile * ATOMS
        y0, y1 = two_numbers(tl.load(y + start * (D // 2) + (i * (D // 2) * apart + k * apart)))
        y_square, bias = two_numbers(tl.load(weights + start + i * apart))
        logit = tl.sum(q0 * y0 + q1 * y1, 0, keep_dims=True) - b_half * y_square
        if BIASED:
            logit += bias
        max_logit, e, down = raised(max_logit, logit, 1)
        total, lost, square_total, square_lost = add_weights(
            total, lost, square_total, square_lost, e, down, 1
        )
        if KIND != "log_prob":
            if KIND == "matvec":
                projection = tl.sum(v0 * y0 + v1 * y1, 0, keep_dims=True)
                tilted = tl.where(e > 0, e * projection, 0.0)
                here = tl.sum(tilted, 1, keep_dims=True)
                second0 = second0 * down + tl.sum(tilted * y0, 1, keep_dims=True)
                second1 = second1 * down + tl.sum(tilted * y1, 1, keep_dims=True)
            else:
                here = tl.sum(e * y_square, 1, keep_dims=True)
            if KIND == "diagonal":
                second0 = second0 * down + tl.sum(e * (y0 * y0), 1, keep_dims=True)
                second1 = second1 * down + tl.sum(e * (y1 * y1), 1, keep_dims=True)
            more, more_lost = add_compensated(more * down, more_lost * down, here)
            first0 = first0 * down + tl.sum(e * y0, 1, keep_dims=True)
            first1 = first1 * down + tl.sum(e * y1, 1, keep_dims=True)
    out = (begin_split + split) * targets + i_target
    count = tl.full((), splits, tl.int64) * targets
    tl.store(scalars + out, tl.where(active, max_logit, -float("inf")), mask=exists)
    tl.store(scalars + count + out, total + lost, mask=exists)
    tl.store(scalars + 2 * count + out, square_total + square_lost, mask=exists)
    if KIND != "log_prob":
        more += more_lost
        if KIND == "matvec":
            tl.store(scalars + 3 * count + out, more, mask=exists)
        elif KIND == "posterior":
            second0 = first0 * 0.0 + more / d
            second1 = second0
        store_pair(vectors, centre, first0, second0, out, count, 2 * k, d, active)
        store_pair(vectors, centre, first1, second1, out, count, 2 * k + 1, d, active)


@triton.jit
def store_pair(vectors, centre, first, second, out, count, k, d, active):
    """Writes reference and moments at coordinates k."""
    mask = active & (k < d)
    b_centre = tl.load(centre + k, mask=k < d, other=0.0) + first * 0.0
    tl.store(vectors + out * d + k, b_centre, mask=mask)
    tl.store(vectors + (count + out) * d + k, first, mask=mask)
    tl.store(vectors + (2 * count + out) * d + k, second, mask=mask)


@triton.jit
def bound_tiles_kernel(
    q,  # [B, D] bfloat16: log2(e) alpha/sigma^2 x', rounded
    y,  # [rows, D] bfloat16: t, rounded
    weights,  # [rows, 2]: |t|^2, log2 pi
    half,  # [B]
    q_norm,  # [B]: the norm of q before it was rounded
    by_products,  # [B]: 0 for the queries whose bounds are wanted
    upper,  # out [B, rows/STRIP]: no logit of the strip is larger; inf where nothing is known
    lower,  # out [splits, B]: some logit of the split is at least this; inf for the other queries
    B,
    rows,
    d,
    splits,
    span,
    BIASED: tl.constexpr,
    STRIP: tl.constexpr,
    D: tl.constexpr,
    ATOMS: tl.constexpr,
    QUERIES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Bounds of the logits by one product of bfloat16 numbers: a rounding of 2^-8 of each operand
    changes <q, t> by about 2^-7 |q| |t| at most."""
    blocks = tl.cdiv(B, QUERIES)
    split = (tl.program_id(0) // blocks).to(tl.int64)
    i_query = (tl.program_id(0) % blocks).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)[:, None]
    exists = i_query < B
    active = exists & (tl.load(by_products + i_query, mask=exists, other=1) == 0)
    k = tl.arange(0, D)[None, :]
    n = tl.arange(0, ATOMS)
    b_q = tl.load(q + i_query * D + k, mask=active, other=0.0)
    b_half = tl.load(half + i_query, mask=active, other=0.0)
    b_norm = tl.load(q_norm + i_query, mask=active, other=0.0)
    largest = tl.full((QUERIES, 1), -float("inf"), tl.float32)
    begin = split * span
    tiles = tl.cdiv(tl.minimum(span, rows - begin).to(tl.int32), ATOMS)
    tiles = tl.where(tl.max(active.to(tl.int32)) > 0, tiles, 0)
    strips = tl.full((), rows, tl.int64) // STRIP
    s = tl.arange(0, ATOMS // STRIP)[None, :]
    for tile in tl.range(0, tiles, num_stages=STAGES):
        start = begin + tile * ATOMS
        b_y = tl.load(y + start * D + n[:, None] * D + k)
        y_square = tl.load(weights + 2 * (start + n))[None, :]
        product = tl.dot(b_q, b_y.T, input_precision="ieee")
        # 2^-7 and 2^-16 for the roundings of the operands, d 2^-23 for the sum of products; the
        # rest for |t|^2, q and what is added to the product
        size = b_norm * tl.sqrt(y_square)
        error = size * (0.00785 + d * 1.2e-7) + (4e-6 + d * 2e-9) * (size + b_half * y_square)
        logit = product - b_half * y_square
        if BIASED:
            bias = tl.load(weights + 2 * (start + n) + 1)[None, :]
            logit += bias
            error += tl.where(bias == -float("inf"), 0.0, 1e-6 * tl.abs(bias))
        bound = logit + error
        bound = tl.where(bound == bound, bound, float("inf"))  # a square that overflows, or a NaN
        bound = tl.max(tl.reshape(bound, (QUERIES, ATOMS // STRIP, STRIP)), 2)
        tl.store(upper + i_query * strips + start // STRIP + s, bound, mask=active)
        least = logit - error
        least = tl.where(least == least, least, -float("inf"))
        largest = tl.maximum(largest, tl.max(least, 1, keep_dims=True))
    tl.store(lower + split * B + i_query, tl.where(active, largest, float("inf")), mask=exists)
