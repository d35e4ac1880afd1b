# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""The kernel that computes expanded logits, or projections: all atoms against many rows, as a
matrix product of parts.

With x' = x - alpha centre and y' = y - centre = factor z + residue,

    -|x - alpha y|^2/(2 sigma^2) = (alpha factor/sigma^2) <x', z> - (alpha^2/(2 sigma^2)) |y'|^2
                                   + (alpha <x', residue> - |x'|^2/2)/sigma^2
                                 = slope <x', z> - curve |y'|^2 + level

The level is common to all atoms. Where the expanded form is as accurate as differences (the rows
that are EXACT, chosen in logits.py), it is left out, and this is the logit. For the others the
kernel writes an upper bound, from products of all parts or, where a product costs time, of the
first ones: it filters the atoms that may matter.

Tensor cores truncate when they add. So a product starts from zero in every tile, and tiles are
added in float32; the factor `one`, which is 1, keeps the compiler from folding that addition into
the product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .functions import LOG2E, valid_atoms
from .operands import about_centre, load_parts


@triton.jit
def chunk_product(
    first, second, third, p_row, mask, row_parts,
    ROW_PARTS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The product over one block of coordinates, from zero: of the parts j of the rows and p of the
    atoms those with j + p < ROW_PARTS, or, of one part of the rows, all."""
    b_row = tl.load(p_row, mask=mask, other=0.0)
    product = tl.dot(first, b_row)
    if PARTS > 1:
        product = tl.dot(second, b_row, product)
    if PARTS > 2:
        product = tl.dot(third, b_row, product)
    if ROW_PARTS > 1:
        b_row = tl.load(p_row + row_parts, mask=mask, other=0.0)
        product = tl.dot(first, b_row, product)
        if PARTS > 1 and ROW_PARTS > 2:
            product = tl.dot(second, b_row, product)
    if ROW_PARTS > 2:
        b_row = tl.load(p_row + 2 * row_parts, mask=mask, other=0.0)
        product = tl.dot(first, b_row, product)
    return product


@triton.jit
def expanded_kernel(
    rows,  # [*, R, d]: the parts of x', or of vectors v
    coefficients,  # [5, R]: slope, curve, level, and the bound's reach and slack
    exact,  # [R], int32: 1 for the rows whose logits are exact; None: all of them
    atoms,  # as `load_parts` reads them
    shift,  # [d], or None
    residue,  # [d], or None
    log_pi,  # [N], or None
    scales,  # [N]: what products with an atom's halves have to be multiplied by, or None
    y_square,  # [N]: |y'|^2; out if SQUARES; None: 0
    out,  # out [R, N], rows out_stride apart: logits in base 2, or upper bounds
    lower,  # out [R, tiles], rows lower_stride apart: a lower bound of the tile's largest, or None
    N,
    d,
    R,
    row_stride,
    part_stride,
    out_stride,
    lower_stride,
    one,
    scale,
    offset,
    factor,
    BOUNDS: tl.constexpr,  # whether rows that are not exact are served
    EXACT: tl.constexpr,  # whether those that are exact are
    SQUARES: tl.constexpr,
    ROW_PARTS: tl.constexpr,
    STACKED: tl.constexpr,  # the three parts of a row are rows of one operand
    PARTS: tl.constexpr,
    HALVES: tl.constexpr,
    AFFINE: tl.constexpr,
    PRIOR: tl.constexpr,
    SCALED: tl.constexpr,
    D: tl.constexpr,
    ATOMS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out = slope <row, z> - curve |y'|^2 + level + log2 pi, plus its error where it is a bound.

    One program has a tile of atoms and ROWS rows.
    """
    blocks = tl.cdiv(R, ROWS)
    tile = (tl.program_id(0) // blocks).to(tl.int64)
    start = tile * ATOMS
    i = tl.arange(0, ATOMS)[:, None]
    begin = (tl.program_id(0) % blocks).to(tl.int64) * ROWS
    i_row = begin + tl.arange(0, ROWS)[None, :]
    served = i_row < R
    chosen = tl.load(exact + i_row, mask=served, other=0) > 0 if exact is not None else served
    if not BOUNDS:
        served = served & chosen
    if not EXACT:
        served = served & ~chosen
    chunks = tl.where(tl.max(served.to(tl.int32)) > 0, tl.cdiv(d, D), 0)
    WIDTH: tl.constexpr = 4 * ROWS if STACKED else ROWS
    j = tl.arange(0, WIDTH)[None, :]
    row_parts = tl.full((), R, tl.int64) * d
    p_rows = rows + (j // ROWS) * row_parts + (begin + j % ROWS) * d
    in_rows = (begin + j % ROWS < R) & (j // ROWS < 3)
    valid = valid_atoms(log_pi, start, i, N, PRIOR)
    product = tl.zeros((ATOMS, WIDTH), tl.float32)
    squares = tl.zeros((ATOMS, 1), tl.float32)
    for c in tl.range(0, chunks, num_stages=STAGES):
        k = c * D + tl.arange(0, D)
        first, second, third = load_parts(
            atoms, start, i, k[None, :], valid, row_stride, part_stride, d, shift, scale, offset,
            PARTS, HALVES, AFFINE,
        )  # fmt: skip
        more = chunk_product(
            first, second, third, p_rows + k[:, None], in_rows & (k < d)[:, None], row_parts,
            1 if STACKED else ROW_PARTS, PARTS,
        )  # fmt: skip
        product = product * one + more
        if SQUARES:
            t = about_centre(
                first, second, third, k[None, :], valid, d, residue, factor, PARTS, SCALED
            )
            squares += tl.sum(t * t, 1, keep_dims=True)
    if STACKED:
        product = tl.sum(tl.reshape(product, (ATOMS, 4, ROWS)), 1)
    exists = i < N - start
    if scales is not None:
        product *= tl.load(scales + start + i, mask=exists, other=0.0)
    slope = tl.load(coefficients + i_row, mask=served, other=0.0)
    curve = tl.load(coefficients + R + i_row, mask=served, other=0.0)
    level = tl.load(coefficients + 2 * R + i_row, mask=served, other=0.0)
    if y_square is not None:
        if SQUARES:
            tl.store(y_square + start + i, squares, mask=exists & (begin == 0))
        else:
            squares = tl.load(y_square + start + i, mask=exists, other=0.0)
    value = tl.where(slope == 0, 0.0, slope * product) + level
    value -= tl.where(curve == 0, 0.0, curve * squares)
    overflow = tl.abs(value) == float("inf")
    if PRIOR:
        prior = LOG2E * tl.load(log_pi + start + i, mask=exists, other=0.0)
        value += prior
    least = value
    if BOUNDS:
        reach = tl.load(coefficients + 3 * R + i_row, mask=served, other=0.0)
        slack = tl.load(coefficients + 4 * R + i_row, mask=served, other=0.0)
        # d/64 2^-23 for the sum of squares, and some roundings
        error = reach * tl.sqrt(squares) + slack + (2e-6 + d * 2e-9) * curve * squares
        if PRIOR:
            error += tl.where(prior == -float("inf"), 0.0, -1e-6 * prior)
        # NaN where a term overflows, which a difference need not do: such atoms are computed again
        error = tl.where(overflow, float("inf"), error)
        error = tl.where(chosen, 0.0, error)
        least = value - error
        value += error
    if EXACT:  # an outlier
        far = chosen & (squares == float("inf")) & (curve > 0)
        value = tl.where(far, -float("inf"), value)
    mask = exists & served
    tl.store(out + i_row * out_stride + start + i, value, mask=mask)
    if lower is not None:
        least = tl.where(mask & (least == least), least, -float("inf"))
        p_lower = lower + i_row * lower_stride + tile
        tl.store(p_lower, tl.max(least, 0, keep_dims=True), mask=served)
