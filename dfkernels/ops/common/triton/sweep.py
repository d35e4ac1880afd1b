"""The sweep: every op's sums over one split of the atoms, by differences, in one pass.

Per lane (a query, or a query with one of its vectors v), with e = exp(l - top) and t = y - ref:
    mass = sum e    square = sum e^2    first = sum e t
    second = sum e t * t (elementwise), or sum e t <t, v> with tilt = sum e <t, v>

A tile of atoms is three-dimensional: coordinates along axis DAX, atoms along axis 1, lanes along
the third. DAX = 2: a thread holds columns of a few rows and lanes share them. DAX = 0: a thread
holds whole lanes, so that every sum stays inside it; for small d. Where d is too large for
registers, logits and <t, v> are GIVEN (`rows_sum`), and a program has a block of the coordinates.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .functions import LOG2E, add_exactly, along, load_atoms, real_atoms


@triton.jit
def sweep(
    x,  # [B, d]
    y,  # [N, d], rows ldy apart; the atoms are scale * y + offset
    v,  # [lanes, d]
    alpha,  # [B]
    sigma,  # [B]
    log_pi,  # [N]
    given,  # [B, N]: logits, base 2; those below floor - gap need only be that
    floor,  # [B]: no more than the largest; inf: nothing to do
    tilts,  # [lanes, N]: <y - about, v>, likewise
    about,  # [lanes, d]
    scalars,  # out [4, splits, lanes]: top (base 2), mass, square, tilt
    vectors,  # out [3, splits, lanes, d]: ref, first, second; where mass > 0
    N,
    d,
    ldy,
    lanes,
    per_query,  # lanes of a query
    splits,
    span,  # atoms of a split
    gap,  # atoms lighter than 2^-gap of the heaviest do not count
    scale,
    offset,
    MATVEC: tl.constexpr,
    PRIOR: tl.constexpr,
    AFFINE: tl.constexpr,
    GIVEN: tl.constexpr,
    D: tl.constexpr,
    ATOMS: tl.constexpr,
    LANES: tl.constexpr,
    DAX: tl.constexpr,
    STAGES: tl.constexpr,
    STRIP: tl.constexpr,  # tiles, where logits are given
):
    T = x.dtype.element_ty
    blocks = tl.cdiv(lanes, LANES)
    parts = tl.cdiv(d, D)  # 1 unless GIVEN
    part = tl.program_id(0) % parts
    split = (tl.program_id(0) // parts // blocks).to(tl.int64)
    lane = (tl.program_id(0) // parts % blocks).to(tl.int64) * LANES + along(LANES, 2 - DAX)
    live = lane < lanes
    query = lane // per_query
    k = part * D + along(D, DAX)
    cell = live & (k < d)
    a = tl.load(alpha + query, mask=live, other=0.0)
    noise = tl.load(sigma + query, mask=live, other=1.0)
    by = -0.5 * LOG2E / (noise * noise)
    xq = tl.load(x + query * d + k, mask=cell, other=0.0)
    if MATVEC:
        vq = tl.load(v + lane * d + k, mask=cell, other=0.0)

    top = tl.zeros_like(by) - float("inf")
    mass = tl.zeros_like(by)
    square = tl.zeros_like(by)
    tilt = tl.zeros_like(by)
    lost = tl.zeros_like(by)
    lost_square = tl.zeros_like(by)
    ref = tl.zeros_like(xq)
    if GIVEN and MATVEC:
        ref = tl.load(about + lane * d + k, mask=cell, other=0.0)
    first = tl.zeros_like(xq)
    second = tl.zeros_like(xq)

    does = live
    least = tl.zeros_like(by) - float("inf")  # some atom's logit is at least this
    begin = split * span
    i = along(ATOMS, 1)
    tiles = tl.cdiv(tl.minimum(span, N - begin).to(tl.int32), ATOMS)
    strips = 1
    strip = tiles
    if GIVEN:
        least = tl.load(floor + query, mask=live, other=float("inf"))
        does = live & (least < float("inf"))
        strip = STRIP
        strips = tl.cdiv(tiles, strip)
    for j in range(strips):
        end = tl.minimum(tiles, (j + 1) * strip)
        if GIVEN:  # most of the time nothing in a strip matters
            n = begin + j * strip * ATOMS + along(STRIP * ATOMS, 1)
            ahead = tl.load(given + query * N + n, mask=(n < N) & does, other=-float("inf"))
            some = tl.max(((ahead > tl.maximum(top, least) - gap) | (ahead != ahead)).to(tl.int32))
            end = tl.where(some > 0, end, j * strip)
        for tile in tl.range(j * strip, end, num_stages=STAGES):
            start = begin + tile * ATOMS
            here = i < N - start
            real = real_atoms(log_pi, start, i, N, PRIOR)
            if GIVEN:
                logit = tl.load(
                    given + query * N + start + i, mask=here & does, other=-float("inf")
                )
                odd = tl.sum(tl.where(logit == logit, 0.0, logit), 1, keep_dims=True)
            else:
                at = load_atoms(y, start, i, k, real, ldy, d, scale, offset, T, AFFINE)
                u = xq - a * at
                distance = tl.sum(u * u, DAX, keep_dims=True)
                odd = tl.sum(distance, 1, keep_dims=True)
                logit = by * distance
                if PRIOR:
                    logit += LOG2E * tl.load(log_pi + start + i, mask=here, other=0.0)
            logit = tl.where(here & does, logit, -float("inf"))
            peak = tl.max(logit, 1, keep_dims=True)
            # Where something is not finite, the sums tell apart: far atoms, of weight 0, and what
            # is no number.
            if (
                tl.max(((peak > tl.maximum(top, least) - gap) | ~(odd < float("inf"))).to(tl.int32))
                > 0
            ):
                new = tl.maximum(top, peak)
                safe = tl.where(new == -float("inf"), 0.0, new)
                if GIVEN:
                    at = load_atoms(y, start, i, k, real, ldy, d, scale, offset, T, AFFINE)
                e = tl.exp2(logit - safe)
                down = tl.exp2(top - safe)
                top = new
                tile_mass = tl.sum(e, 1, keep_dims=True)
                mass *= down
                tilt *= down
                first *= down
                second *= down
                heavier = (tile_mass > mass) & (not (GIVEN and MATVEC))
                if tl.max(heavier.to(tl.int32)) > 0:
                    # What came before weighs less than this tile: go over to the tile's mean, found
                    # from its heaviest atom. Where one atom has all the weight, ref is that atom,
                    # and nothing cancels.
                    best = tl.argmax(logit, 1, keep_dims=True)
                    best = tl.sum(tl.where(i == best, at, 0.0), 1, keep_dims=True)
                    mean = best + tl.sum(e * (at - best), 1, keep_dims=True) / tl.where(
                        heavier, tile_mass, 1.0
                    )
                    moved = tl.where(heavier, ref - mean, 0.0)
                    ref = tl.where(heavier, mean, ref)
                    if MATVEC:
                        shift = tl.sum(moved * vq, DAX, keep_dims=True)
                        tilt += mass * shift
                        second += shift * first + tilt * moved
                    else:
                        second += moved * (2 * first + mass * moved)
                    first += mass * moved
                t = at - ref
                et = e * t
                first += tl.sum(et, 1, keep_dims=True)
                if MATVEC:
                    if GIVEN:
                        counts = here & does & (logit >= least - gap)
                        p = tl.load(tilts + lane * N + start + i, mask=counts, other=0.0)
                    else:
                        p = tl.where(
                            e > 0, tl.sum(t * vq, DAX, keep_dims=True), 0.0
                        )  # far: no 0 times inf
                    tilt += tl.sum(e * p, 1, keep_dims=True)
                    second += tl.sum(p * et, 1, keep_dims=True)
                else:
                    second += tl.sum(t * et, 1, keep_dims=True)
                mass, lost = add_exactly(mass, lost * down, tile_mass)
                square, lost_square = add_exactly(
                    square * (down * down),
                    lost_square * (down * down),
                    tl.sum(e * e, 1, keep_dims=True),
                )

    out = split * lanes + lane
    count = tl.full((), splits, tl.int64) * lanes
    whole = live & (part == 0)
    odd = 0.0 * mass + tl.sum(0.0 * first, DAX, keep_dims=True)  # nan where anything was no number
    tl.store(
        scalars + out, top + odd, mask=whole
    )  # or a split of nothing else would seem to have no atom
    tl.store(scalars + count + out, mass + lost + odd, mask=whole)
    tl.store(scalars + 2 * count + out, square + lost_square, mask=whole)
    if MATVEC:
        tl.store(scalars + 3 * count + out, tilt, mask=whole)
    cell &= mass > 0
    tl.store(vectors + out * d + k, ref, mask=cell)
    tl.store(vectors + (count + out) * d + k, first, mask=cell)
    tl.store(vectors + (2 * count + out) * d + k, second, mask=cell)
