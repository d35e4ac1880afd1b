# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""The kernel that accumulates every op's moments over one split of the atoms, in one pass.

Per target (a query, or a query with one of its vectors v), with e = exp(logit - max_logit) and
t = y - reference:

    weight_sum = sum e     weight_square_sum = sum e^2     first_moment = sum e t
    second_moment = sum e t * t (elementwise), or
    second_moment = sum e t <t, v> with projection_sum = sum e <t, v>

A tile is three-dimensional: coordinates along COORD_AXIS, atoms along axis 1, targets along the
third axis. COORD_AXIS = 2: a thread holds columns of a few rows, and targets share them.
COORD_AXIS = 0, for small d: a thread holds whole targets, so that every sum stays inside it. Where
d is too large for registers, logits and projections are GIVEN (differences.py, expanded.py), and a
program has a block of the coordinates. Where strips of tiles are bounded (fused.py), those in which
nothing matters are left out. With lists of atoms a program has one target and a split of its list.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .functions import (
    LOG2E,
    add_compensated,
    any_true,
    index_along,
    list_of,
    listed_rows,
    load_atoms,
    valid_atoms,
)


class Moments(NamedTuple):
    """What a program has accumulated so far, relative to max_logit and about the reference."""

    max_logit: tl.tensor
    weight_sum: tl.tensor
    weight_lost: tl.tensor  # what the rounding of weight_sum lost
    weight_square_sum: tl.tensor
    weight_square_lost: tl.tensor  # what the rounding of weight_square_sum lost
    projection_sum: tl.tensor
    reference: tl.tensor
    first_moment: tl.tensor
    second_moment: tl.tensor


@triton.jit
def no_moments(scalar, reference):
    """The moments of no atoms, about the reference; `scalar` gives shape and dtype of the sums."""
    zero = tl.zeros_like(scalar)
    vector = tl.zeros_like(reference)
    return Moments(zero - float("inf"), zero, zero, zero, zero, zero, reference, vector, vector)


@triton.jit
def may_matter(logit, max_logit, least, gap):
    """Whether an atom with this logit, or bound, is not negligible beside those so far and one of
    at least `least`. A large max_logit less the gap is, rounded, max_logit itself."""
    return (logit >= tl.maximum(max_logit, least) - gap) & (logit > -float("inf"))


@triton.jit
def raise_max_logit(m, logit, peak):
    """Goes over to the larger max_logit: (e of the tile, its sum, the factor `down` of all older
    weights, the moments times it). weight_lost and the sum of squares are left to `add_tile`."""
    new = tl.maximum(m.max_logit, peak)
    safe = tl.where(new == -float("inf"), 0.0, new)
    e = tl.exp2(logit - safe)
    down = tl.exp2(m.max_logit - safe)
    tile_weight = tl.sum(e, 1, keep_dims=True)
    m = Moments(
        new,
        m.weight_sum * down,
        m.weight_lost,
        m.weight_square_sum,
        m.weight_square_lost,
        m.projection_sum * down,
        m.reference,
        m.first_moment * down,
        m.second_moment * down,
    )
    return e, tile_weight, down, m


@triton.jit
def move_reference(
    m, e, logit, b_y, b_v, i, heavier, tile_weight, MATVEC: tl.constexpr, COORD_AXIS: tl.constexpr
):
    """The moments about this tile's mean for the targets for which it is `heavier` than all before.

    The mean is found from the tile's heaviest atom. Where one atom has all the weight, the
    reference is that atom, and nothing cancels.
    """
    heaviest = tl.argmax(logit, 1, keep_dims=True)
    heaviest = tl.sum(tl.where(i == heaviest, b_y, 0.0), 1, keep_dims=True)
    offset = tl.sum(e * (b_y - heaviest), 1, keep_dims=True)
    mean = heaviest + offset / tl.where(heavier, tile_weight, 1.0)
    delta = tl.where(heavier, m.reference - mean, 0.0)
    projection_sum = m.projection_sum
    second_moment = m.second_moment
    if MATVEC:
        delta_v = tl.sum(delta * b_v, COORD_AXIS, keep_dims=True)
        projection_sum += m.weight_sum * delta_v
        second_moment += delta_v * m.first_moment + projection_sum * delta
    else:
        second_moment += delta * (2 * m.first_moment + m.weight_sum * delta)
    return Moments(
        m.max_logit,
        m.weight_sum,
        m.weight_lost,
        m.weight_square_sum,
        m.weight_square_lost,
        projection_sum,
        tl.where(heavier, mean, m.reference),
        m.first_moment + m.weight_sum * delta,
        second_moment,
    )


@triton.jit
def add_tile(m, e, first_moment, second_moment, projection_sum, down, tile_weight):
    """Adds the tile's weights e, whose sum is tile_weight, to both sums of weights.

    The other three moments are passed with the tile added. weight_lost and the sum of squares are
    scaled by `down` (or its square) here; `raise_max_logit` has scaled weight_sum.
    """
    weight_sum, weight_lost = add_compensated(m.weight_sum, m.weight_lost * down, tile_weight)
    weight_square_sum, weight_square_lost = add_compensated(
        m.weight_square_sum * (down * down),
        m.weight_square_lost * (down * down),
        tl.sum(e * e, 1, keep_dims=True),
    )
    return Moments(
        m.max_logit,
        weight_sum,
        weight_lost,
        weight_square_sum,
        weight_square_lost,
        projection_sum,
        m.reference,
        first_moment,
        second_moment,
    )


@triton.jit
def store_moments(
    m,
    scalars,
    vectors,
    i_target,
    k,
    split,
    splits,
    targets,
    d,
    part,
    MATVEC: tl.constexpr,
    COORD_AXIS: tl.constexpr,
):
    """Writes one split's moments; max_logit and weight_sum become NaN if a sum is not finite.

    max_logit has to become NaN too: otherwise a split in which all logits are NaN would look like
    one without atoms.
    """
    active = i_target < targets
    out = split * targets + i_target
    count = tl.full((), splits, tl.int64) * targets
    whole = active & (part == 0)
    taint = 0.0 * m.weight_sum + tl.sum(0.0 * m.first_moment, COORD_AXIS, keep_dims=True)
    tl.store(scalars + out, m.max_logit + taint, mask=whole)
    tl.store(scalars + count + out, m.weight_sum + m.weight_lost + taint, mask=whole)
    tl.store(scalars + 2 * count + out, m.weight_square_sum + m.weight_square_lost, mask=whole)
    if MATVEC:
        tl.store(scalars + 3 * count + out, m.projection_sum, mask=whole)
    mask = active & (k < d) & (m.weight_sum > 0)
    tl.store(vectors + out * d + k, m.reference, mask=mask)
    tl.store(vectors + (count + out) * d + k, m.first_moment, mask=mask)
    tl.store(vectors + (2 * count + out) * d + k, m.second_moment, mask=mask)


@triton.jit
def sweep_kernel(
    anchor,  # [B, d]
    rest,  # [B, d]: x = anchor + rest
    y,  # [N, d], rows y_stride apart; the atoms are scale * y + offset
    v,  # [targets, d], or None
    alpha,  # [B]
    sigma,  # [B]
    log_pi,  # [N], or None
    atoms,  # int64: the rows of all lists, query after query, or None: every query counts all
    first,  # int64 [B + 1]: where each query's begin, and where the last ones end; or None
    logits,  # [B, N], or of lists [pairs]; base 2; below floor - gap only upper bounds; or None
    bounds,  # [B, row_strips]: no logit of the strip is larger, or None; less a constant, as floor
    floor,  # [B]: a lower bound of the largest logit, or None; inf: skip the query
    projections,  # [targets, N]: <y - reference, v>, right where the logit matters, or None; of
    # lists [pairs times vectors_per_query]
    reference,  # [targets, d], or None: chosen here
    scalars,  # out [4, splits, targets]: max_logit (base 2), the sums of e, e^2 and e <t, v>
    vectors,  # out [3, splits, targets, d]: reference and moments, where weight_sum > 0
    N,
    d,
    y_stride,
    targets,
    vectors_per_query,
    splits,
    span,  # atoms of a split
    row_strips,  # strips of a row of bounds
    gap,  # an atom lighter than 2^-gap of the heaviest is negligible
    scale,
    offset,
    MATVEC: tl.constexpr,
    PRIOR: tl.constexpr,
    AFFINE: tl.constexpr,
    GIVEN: tl.constexpr,
    D: tl.constexpr,
    ATOMS: tl.constexpr,
    TARGETS: tl.constexpr,
    COORD_AXIS: tl.constexpr,
    STAGES: tl.constexpr,
    STRIP: tl.constexpr,  # tiles whose logits or bounds are looked at together
):
    """Accumulates the moments of the module's docstring: one program has TARGETS targets, D
    coordinates and one split of the atoms.

    Logits are in base 2, log2 pi - log2(e) (|x - alpha y|^2 - |rest|^2)/(2 sigma^2), computed here
    by differences, unless they are GIVEN.
    """
    T = anchor.dtype.element_ty
    target_blocks = tl.cdiv(targets, TARGETS)
    parts = tl.cdiv(d, D)  # 1 unless GIVEN
    part = tl.program_id(0) % parts
    split = (tl.program_id(0) // parts // target_blocks).to(tl.int64)
    i_block = (tl.program_id(0) // parts % target_blocks).to(tl.int64)
    i_target = i_block * TARGETS + index_along(TARGETS, 2 - COORD_AXIS)
    active = i_target < targets
    i_query = i_target // vectors_per_query
    k = part * D + index_along(D, COORD_AXIS)
    mask = active & (k < d)
    b_alpha = tl.load(alpha + i_query, mask=active, other=0.0)
    b_sigma = tl.load(sigma + i_query, mask=active, other=1.0)
    factor = -0.5 * LOG2E / (b_sigma * b_sigma)
    b_anchor = tl.load(anchor + i_query * d + k, mask=mask, other=0.0)
    b_rest = tl.load(rest + i_query * d + k, mask=mask, other=0.0)
    b_v = tl.load(v + i_target * d + k, mask=mask, other=0.0) if MATVEC else b_anchor
    b_reference = tl.zeros_like(b_anchor)
    if GIVEN and MATVEC:
        b_reference = tl.load(reference + i_target * d + k, mask=mask, other=0.0)
    m = no_moments(factor, b_reference)
    least = tl.zeros_like(factor) - float("inf")  # some atom's logit is at least this
    begin = split * span
    i = index_along(ATOMS, 1)
    if atoms is None:
        count, i_pair, i_projection = N, i_query * N, i_target * N
    else:
        count, i_pair, i_projection = list_of(first, i_block, vectors_per_query)
    tiles = tl.cdiv(tl.maximum(tl.minimum(span, count - begin), 0).to(tl.int32), ATOMS)
    BOUNDED: tl.constexpr = bounds is not None
    strip = STRIP if GIVEN or BOUNDED else tiles
    strips = tl.cdiv(tiles, strip) if GIVEN or BOUNDED else 1
    if GIVEN or BOUNDED:
        b_floor = tl.load(floor + i_query, mask=active, other=float("inf"))
        active = active & (b_floor < float("inf"))
    if GIVEN:  # bounds lack what all logits of a query share, and so does their floor
        least = b_floor
    for j in range(strips):
        end = tl.minimum(tiles, (j + 1) * strip)
        if GIVEN:  # most of the time nothing in a strip matters
            n = begin + j * strip * ATOMS + index_along(STRIP * ATOMS, 1)
            ahead = tl.load(logits + i_pair + n, mask=(n < count) & active, other=-float("inf"))
            any_matters = may_matter(ahead, m.max_logit, least, gap) | (ahead != ahead)
            end = tl.where(any_true(any_matters), end, j * strip)
        if BOUNDED:
            p_bound = bounds + i_query * row_strips + begin // (STRIP * ATOMS) + j
            ahead = tl.load(p_bound, mask=active, other=-float("inf"))
            end = tl.where(any_true(ahead >= b_floor - gap), end, j * strip)
        for tile in tl.range(j * strip, end, num_stages=STAGES):
            start = begin + tile * ATOMS
            exists = i < count - start
            row, i_atom = listed_rows(atoms, i_pair, start, i, exists, N)
            valid = valid_atoms(log_pi, row, i_atom, N, PRIOR)
            if GIVEN:
                p_logit = logits + i_pair + start + i
                logit = tl.load(p_logit, mask=exists & active, other=-float("inf"))
                taint = tl.sum(tl.where(logit == logit, 0.0, logit), 1, keep_dims=True)
            else:
                b_y = load_atoms(y, row, i_atom, k, valid, y_stride, d, scale, offset, T, AFFINE)
                a = b_anchor - b_alpha * b_y
                distance = tl.sum(a * (a + 2 * b_rest), COORD_AXIS, keep_dims=True)
                taint = tl.sum(distance, 1, keep_dims=True)
                logit = factor * distance
                if PRIOR:
                    logit += LOG2E * tl.load(log_pi + row + i_atom, mask=exists, other=0.0)
            logit = tl.where(exists & active, logit, -float("inf"))
            peak = tl.max(logit, 1, keep_dims=True)
            # Where something is not finite, the sums are taken too: they tell an outlier, which has
            # weight 0, from what is no number.
            matters = may_matter(peak, m.max_logit, least, gap) | ~(taint < float("inf"))
            if any_true(matters):
                if GIVEN:
                    b_y = load_atoms(
                        y, row, i_atom, k, valid, y_stride, d, scale, offset, T, AFFINE
                    )
                e, tile_weight, down, m = raise_max_logit(m, logit, peak)
                heavier = (tile_weight > m.weight_sum) & (not (GIVEN and MATVEC))
                if any_true(heavier):
                    m = move_reference(
                        m, e, logit, b_y, b_v, i, heavier, tile_weight, MATVEC, COORD_AXIS
                    )
                t = b_y - m.reference
                et = e * t
                first_moment = m.first_moment + tl.sum(et, 1, keep_dims=True)
                projection_sum = m.projection_sum
                if MATVEC:
                    if GIVEN:
                        counts = exists & active & (logit >= least - gap)
                        p_projection = projections + i_projection + start + i
                        projection = tl.load(p_projection, mask=counts, other=0.0)
                    else:  # 0 for an outlier, whose weight is 0 and whose <t, v> may be infinite
                        projection = tl.sum(t * b_v, COORD_AXIS, keep_dims=True)
                        projection = tl.where(e > 0, projection, 0.0)
                    projection_sum += tl.sum(e * projection, 1, keep_dims=True)
                    second_moment = m.second_moment + tl.sum(projection * et, 1, keep_dims=True)
                else:
                    second_moment = m.second_moment + tl.sum(t * et, 1, keep_dims=True)
                m = add_tile(m, e, first_moment, second_moment, projection_sum, down, tile_weight)
    store_moments(
        m, scalars, vectors, i_target, k, split, splits, targets, d, part, MATVEC, COORD_AXIS
    )
