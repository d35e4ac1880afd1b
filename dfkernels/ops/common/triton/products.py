# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""Sums over the atoms for the queries that take products: weights times atoms, both as parts.

    sum_i e_i (y_i - centre) = factor sum_i e_i z_i + residue sum_i e_i

The weights are written out as parts, beside the sums of one number per atom. A few rows of them are
stacked and share one read of the atoms as they are stored. For many rows, atoms are halves with a
scale each; the weight times that scale is written in halves too, with one scale for each row and
BLOCK atoms. A program whose rows take no products does nothing.

Tensor cores truncate when they add. So a product starts from zero in every tile, and tiles are
added in float32, CHAINS of them, then in double.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import Device, device_of
from .functions import valid_atoms
from .halves import scale_of, split_halves
from .logits import Chunk, Logits, Tiling, chunks, few
from .operands import about_centre, load_parts, operand
from .parts import split_parts
from .problem import Problem

CHAINS = 256  # tiles that are added up in float32
BLOCK = 1024  # atoms whose weights, of one row, have one scale


@triton.jit
def weight_parts_kernel(
    logits,  # [B, N], rows logits_stride apart
    max_logit,  # [B]
    by_products,  # [B], int32: 1 for the queries that take products
    y_square,  # [N]: |y - centre|^2
    projections,  # [R, N], rows projections_stride apart: <y - reference, v>, or None
    scales,  # [N], of atoms in halves, or None
    parts,  # out [*, R, width]: the parts of e, or of e times the projection, and of no atoms 0
    row_scales,  # out [R, blocks]: of halves; or None
    sums,  # out [4, splits, R]: of e, e^2, e |y - centre|^2 and e times the projection
    N,
    R,
    width,
    vectors_per_query,
    logits_stride,
    projections_stride,
    splits,
    span,
    ATOMS: tl.constexpr,
):
    """e = 2^(logit - max_logit); one program has one row and one split of the atoms. Where atoms
    have scales, the halves of e times the scale are written, and a scale for every tile."""
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    query = row // vectors_per_query
    begin = split.to(tl.int64) * span
    tiles = tl.cdiv(tl.minimum(span, width - begin).to(tl.int32), ATOMS)
    tiles = tl.where(tl.load(by_products + query) > 0, tiles, 0)
    b_max_logit = tl.load(max_logit + query)
    zero = tl.zeros((ATOMS,), tl.float32)
    weight_sum, weight_square_sum, square_moment, projection_sum = zero, zero, zero, zero
    count = tl.full((), R, tl.int64) * width
    for tile in range(tiles):
        i = begin + tile * ATOMS + tl.arange(0, ATOMS)
        mask = i < N
        logit = tl.load(logits + query * logits_stride + i, mask=mask, other=-float("inf"))
        e = tl.exp2(logit - b_max_logit)
        weight_sum += e
        weight_square_sum += e * e
        square = tl.load(y_square + i, mask=mask, other=0.0)
        square_moment += tl.where(e == 0, 0.0, e * square)  # an outlier's square may be infinite
        if projections is not None:
            p_projection = projections + row * projections_stride + i
            e = tl.where(e == 0, 0.0, e * tl.load(p_projection, mask=mask, other=0.0))
            projection_sum += e
        p_parts = parts + row * width + i
        if scales is not None:
            scale = tl.load(scales + i, mask=mask, other=0.0)
            e = tl.where(e == 0, 0.0, e * scale)  # an outlier's scale may be anything
            unit, inverse = scale_of(tl.max(tl.abs(e)))
            first, second = split_halves(e * inverse)
            p_scale = row_scales + row * tl.cdiv(width, ATOMS) + begin // ATOMS + tile
            tl.store(p_scale, unit)
        else:
            first, second, third = split_parts(e)
            tl.store(p_parts + 2 * count, third, mask=i < width)
        tl.store(p_parts, first, mask=i < width)
        tl.store(p_parts + count, second, mask=i < width)
    p_sums = sums + split * R + row
    place = tl.full((), splits, tl.int64) * R
    tl.store(p_sums, tl.sum(weight_sum))
    tl.store(p_sums + place, tl.sum(weight_square_sum))
    tl.store(p_sums + 2 * place, tl.sum(square_moment))
    tl.store(p_sums + 3 * place, tl.sum(projection_sum))


@triton.jit
def weights_product(
    p_weights, mask, row_parts, first, second, third, ROW_PARTS: tl.constexpr, PARTS: tl.constexpr
):
    """The sums over one tile of atoms, from zero, of the parts that `chunk_product` of expanded.py
    takes."""
    b_weights = tl.load(p_weights, mask=mask, other=0.0)
    product = tl.dot(b_weights, first)
    if PARTS > 1:
        product = tl.dot(b_weights, second, product)
    if PARTS > 2:
        product = tl.dot(b_weights, third, product)
    if ROW_PARTS > 1:
        b_weights = tl.load(p_weights + row_parts, mask=mask, other=0.0)
        product = tl.dot(b_weights, first, product)
        if PARTS > 1 and ROW_PARTS > 2:
            product = tl.dot(b_weights, second, product)
    if ROW_PARTS > 2:
        b_weights = tl.load(p_weights + 2 * row_parts, mask=mask, other=0.0)
        product = tl.dot(b_weights, first, product)
    return product


@triton.jit
def weighted_sums_kernel(
    weights,  # [*, R, width]: parts
    row_scales,  # [R, blocks]: of weights in halves; or None
    by_products,  # [R], int32: 1 for the rows that are wanted
    atoms,  # as `load_parts` reads them
    shift,  # [d], or None
    residue,  # [d], or None
    log_pi,  # [N], or None
    out,  # out [splits, R, d]
    N,
    d,
    R,
    width,
    row_stride,
    part_stride,
    span,
    one,
    scale,
    offset,
    factor,
    SQUARED: tl.constexpr,
    STACKED: tl.constexpr,
    PARTS: tl.constexpr,
    HALVES: tl.constexpr,
    AFFINE: tl.constexpr,
    PRIOR: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    ATOMS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out = weights z, or weights (y - centre)^2 if SQUARED, over one split. One program has ROWS
    rows, D coordinates and one split."""
    blocks, row_blocks = tl.cdiv(d, D), tl.cdiv(R, ROWS)
    k = tl.program_id(0) % blocks * D + tl.arange(0, D)[None, :]
    begin = (tl.program_id(0) // blocks % row_blocks).to(tl.int64) * ROWS
    split = (tl.program_id(0) // blocks // row_blocks).to(tl.int64)
    i_row = begin + tl.arange(0, ROWS)[:, None]
    wanted = tl.max(tl.load(by_products + i_row, mask=i_row < R, other=0)) > 0
    first_atom = split * span
    tiles = tl.cdiv(tl.minimum(span, N - first_atom).to(tl.int32), ATOMS)
    tiles = tl.where(wanted, tiles, 0)
    WIDTH: tl.constexpr = 4 * ROWS if STACKED else ROWS
    j = tl.arange(0, WIDTH)[:, None]
    in_rows = (begin + j % ROWS < R) & (j // ROWS < 3)
    row_parts = tl.full((), R, tl.int64) * width
    p_weights = weights + (j // ROWS) * row_parts + (begin + j % ROWS) * width
    total = tl.zeros((WIDTH, D), tl.float32)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        start = first_atom + tile * ATOMS
        i = tl.arange(0, ATOMS)
        valid = valid_atoms(log_pi, start, i[:, None], N, PRIOR)
        first, second, third = load_parts(
            atoms, start, i[:, None], k, valid, row_stride, part_stride, d, shift, scale, offset,
            PARTS, HALVES, AFFINE,
        )  # fmt: skip
        if SQUARED:
            t = about_centre(first, second, third, k, valid, d, residue, factor, PARTS, SCALED)
            first, second, third = split_parts(tl.where(t * t > 3e38, 3e38, t * t))
        if HALVES:  # loaded while the product is under way
            p_scale = row_scales + i_row * tl.cdiv(width, BLOCK) + start // BLOCK
            scale_of_rows = tl.load(p_scale, mask=i_row < R, other=0.0)
        more = weights_product(
            p_weights + start + i[None, :], in_rows & (i < width - start)[None, :], row_parts,
            first, second, third, 1 if STACKED else 2 if HALVES else 3, 3 if SQUARED else PARTS,
        )  # fmt: skip
        if HALVES:
            total += scale_of_rows * more
        else:
            total = total * one + more
    if STACKED:
        total = tl.sum(tl.reshape(total, (4, ROWS, D)), 0)
    p_out = out + (split * R + i_row) * d + k
    tl.store(p_out, total, mask=(i_row < R) & (k < d))


class Sums(NamedTuple):
    """Over all atoms, in double; what belongs to rows that do not take products is undefined."""

    weight: Tensor  # [R]: sum e
    weight_square: Tensor  # [R]: sum e^2
    square_moment: Tensor  # [R]: sum e |y - centre|^2
    projection: Tensor  # [R]: sum e <y - reference, v>; 0 without projections
    vector: (
        Tensor  # [R, d]: sum e (y - centre), of e <y - reference, v> where there are projections
    )


class Weights(NamedTuple):
    """The weights of some atoms, for `weighted_sums_kernel`."""

    parts: Tensor  # [3, R, width] bfloat16, or two float16 halves
    row_scales: Tensor | None  # [R, blocks]: of halves


def _write_weights(
    c: Chunk, logits: Logits, projections: Tensor | None, R: int, device: Device
) -> tuple[Weights, Tensor]:
    """The weights of a chunk, and four sums [4, R] in double."""
    value, N = logits.value[:, c.at], c.at.stop - c.at.start
    width = triton.cdiv(N, 64) * 64
    fill = triton.cdiv(8 * device.multiprocessors, R)
    splits = min(triton.cdiv(width, BLOCK), max(fill, triton.cdiv(width, BLOCK * CHAINS)))
    span = triton.cdiv(triton.cdiv(width, splits), BLOCK) * BLOCK
    splits = triton.cdiv(width, span)
    if c.z.scales is None:
        out = Weights(value.new_empty(3, R, width, dtype=torch.bfloat16), None)
    else:
        row_scales = value.new_empty(R, triton.cdiv(width, BLOCK))
        out = Weights(value.new_empty(2, R, width, dtype=torch.float16), row_scales)
    sums = value.new_empty(4, splits, R)
    along = None if projections is None else projections[:, c.at]
    weight_parts_kernel[(R * splits,)](
        logits=value,
        max_logit=logits.max_logit,
        by_products=logits.by_products,
        y_square=logits.y_square[c.at],
        projections=along,
        scales=c.z.scales,
        parts=out.parts,
        row_scales=out.row_scales,
        sums=sums,
        N=N,
        R=R,
        width=width,
        vectors_per_query=R // value.shape[0],
        logits_stride=value.stride(0),
        projections_stride=0 if along is None else along.stride(0),
        splits=splits,
        span=span,
        ATOMS=BLOCK,
        num_warps=4,
    )
    return out, sums.sum(1, dtype=torch.float64)


def sum_tiling(rows: int, atom_bytes: int, in_registers: bool, device: Device) -> Tiling:
    """The tile of `weighted_sums_kernel`; the arguments are those of `tiling`."""
    stacked = few(rows) and rows <= 16
    ROWS = 4 if rows <= 4 else 16 if rows <= 16 else 64 if few(rows) else 128
    D = 256 if rows <= 4 else 128
    hopper = device.cc // 10 == 9  # whose tensor cores read operands from memory
    if in_registers:
        D = 64 if hopper else 32
    elif not few(rows) and not (hopper or (device.cc // 10 == 10 and atom_bytes == 2)):
        D = 64  # others would spill
    width = 4 * ROWS if stacked else (3 if few(rows) else 2) * ROWS
    stages = 3
    while stages * 64 * (D * atom_bytes + 2 * width) > device.shared - 2**13:
        D, stages = (D // 2, 3) if stages == 2 else (D, 2)
    sizes = {"D": D, "ATOMS": 64, "ROWS": ROWS, "STAGES": stages}
    return Tiling(sizes, stacked, 4 if ROWS == 4 else 8)


def _vector_sums(
    c: Chunk, weights: Weights, by_products: Tensor, squared: bool, device: Device
) -> Tensor:
    """Sums [R, *] in double over a chunk, of all numbers of the atoms' rows; squared: of squares
    that are taken in the kernel."""
    z, R, N, d = c.z, weights.parts.shape[1], c.at.stop - c.at.start, c.z.atoms.shape[-1]
    t = sum_tiling(R, z.bytes, z.in_registers or squared, device)
    blocks = triton.cdiv(d, t.sizes["D"]) * triton.cdiv(R, t.sizes["ROWS"])
    tiles = triton.cdiv(N, t.sizes["ATOMS"])
    splits = max(
        triton.cdiv(tiles, CHAINS), min(tiles, triton.cdiv(4 * device.multiprocessors, blocks))
    )
    span = triton.cdiv(tiles, splits) * t.sizes["ATOMS"]
    splits = triton.cdiv(N, span)
    log_pi = c.log_pi if z.scales is None else None  # masked atoms in halves are 0
    out = torch.empty(splits, R, d, dtype=torch.float32, device=z.atoms.device)
    weighted_sums_kernel[(blocks * splits,)](
        **z.arguments,
        weights=weights.parts,
        row_scales=weights.row_scales,
        by_products=by_products,
        residue=z.residue if squared else None,
        log_pi=log_pi,
        out=out,
        N=N,
        d=d,
        R=R,
        width=weights.parts.shape[2],
        span=span,
        one=1.0,
        factor=z.factor,
        SQUARED=squared,
        STACKED=t.stacked,
        PRIOR=log_pi is not None,
        SCALED=squared and z.factor != 1.0,
        BLOCK=BLOCK,
        **t.sizes,
        num_warps=t.warps,
    )
    return out.sum(0, dtype=torch.float64)


def weighted_sums(
    p: Problem, logits: Logits, projections: Tensor | None = None, *, squared: bool = False
) -> Sums:
    """The sums of the queries that take products, or of their vectors where there are projections.

    Args:
        p: the call.
        logits: of all pairs.
        projections: <y - reference, v> [targets, N].
        squared: sum e (y - centre)^2, coordinate by coordinate, instead of sum e (y - centre).
    """
    R = p.x.shape[0] if projections is None else p.targets
    device, numbers, vector = device_of(p.x), 0.0, 0.0
    by_products = logits.by_products.repeat_interleave(R // p.x.shape[0])
    for c in chunks(p, R, (6 if few(R) else 4) * R, squared=squared):
        weights, sums = _write_weights(c, logits, projections, R, device)
        numbers = numbers + sums
        vector = vector + _vector_sums(c, weights, by_products, squared and few(R), device)
    weight = numbers[3] if projections is not None else numbers[0]
    vector = vector[:, : p.y.shape[1]]
    if not squared:
        z = operand(p)
        vector = z.factor * vector
        if z.residue is not None:
            vector += weight[:, None] * z.residue.double()
    return Sums(*numbers, vector)
