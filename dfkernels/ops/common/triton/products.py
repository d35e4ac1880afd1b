# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""Sums over the atoms for the queries that take products: weights times atoms, both as bfloat16
parts.

    sum_i e_i (y_i - centre) = factor sum_i e_i z_i + residue sum_i e_i

The weights are written out as three parts, beside the sums of one number per atom. A few rows of
them are stacked and share one read of the atoms (`weighted_sums_kernel`); for many rows the product
is the library's (`float32_product`), some atoms at a time, so that chains of truncated additions
stay short.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import Device, device_of
from .functions import valid_atoms
from .logits import PREPARED, Logits, Tiling, chunks, few
from .operands import about_centre, load_parts, operand
from .parts import split_parts
from .problem import Problem

CHAIN = 2048  # atoms that the library adds up in one chain of tensor-core additions
CHAINS = 256  # such sums are added up in float32, then in double


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 of bfloat16 matrices; elsewhere than on CUDA by float32 matrices, in which
    products of bfloat16 numbers are exact."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@triton.jit
def weight_parts_kernel(
    logits,  # [B, N], rows logits_stride apart
    max_logit,  # [B]
    by_products,  # [B], int32: 1 for the queries that take products
    y_square,  # [N]: |y - centre|^2
    projections,  # [R, N], rows projections_stride apart: <y - reference, v>, or None
    parts,  # out [3, R, width]: the parts of e, or of e times the projection, and of no atoms 0
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
    """e = 2^(logit - max_logit); one program has one row and one split of the atoms."""
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
        first, second, third = split_parts(e)
        p_parts = parts + row * width + i
        tl.store(p_parts, first, mask=i < width)
        tl.store(p_parts + count, second, mask=i < width)
        tl.store(p_parts + 2 * count, third, mask=i < width)
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
    """The sums over one tile of atoms, from zero, as `chunk_product` of expanded.py."""
    b_weights = tl.load(p_weights, mask=mask, other=0.0)
    product = tl.dot(b_weights, first)
    if PARTS > 1:
        product = tl.dot(b_weights, second, product)
    if PARTS > 2:
        product = tl.dot(b_weights, third, product)
    if ROW_PARTS > 1:
        b_weights = tl.load(p_weights + row_parts, mask=mask, other=0.0)
        product = tl.dot(b_weights, first, product)
        if PARTS > 1:
            product = tl.dot(b_weights, second, product)
        b_weights = tl.load(p_weights + 2 * row_parts, mask=mask, other=0.0)
        product = tl.dot(b_weights, first, product)
    return product


@triton.jit
def weighted_sums_kernel(
    weights,  # [3, R, width]: parts
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
    AFFINE: tl.constexpr,
    PRIOR: tl.constexpr,
    SCALED: tl.constexpr,
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
            PARTS, AFFINE,
        )  # fmt: skip
        if SQUARED:
            t = about_centre(first, second, third, k, valid, d, residue, factor, PARTS, SCALED)
            first, second, third = split_parts(tl.where(t * t > 3e38, 3e38, t * t))
        total = total * one + weights_product(
            p_weights + start + i[None, :], in_rows & (i < width - start)[None, :], row_parts,
            first, second, third, 1 if STACKED else 3, 3 if SQUARED else PARTS,
        )  # fmt: skip
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


def _write_weights(
    logits: Logits, projections: Tensor | None, at: slice, R: int, device: Device
) -> tuple[Tensor, Tensor]:
    """The parts [3, R, width] of the weights of some atoms, and four sums [4, R] in double."""
    value, N = logits.value[:, at], at.stop - at.start
    width = triton.cdiv(N, 64) * 64
    fill = triton.cdiv(8 * device.multiprocessors, R)
    splits = min(triton.cdiv(width, 1024), max(fill, triton.cdiv(width, 1024 * CHAINS)))
    span = triton.cdiv(triton.cdiv(width, splits), 1024) * 1024
    splits = triton.cdiv(width, span)
    parts = value.new_empty(3, R, width, dtype=torch.bfloat16)
    sums = value.new_empty(4, splits, R)
    along = None if projections is None else projections[:, at]
    weight_parts_kernel[(R * splits,)](
        logits=value,
        max_logit=logits.max_logit,
        by_products=logits.by_products,
        y_square=logits.y_square[at],
        projections=along,
        parts=parts,
        sums=sums,
        N=N,
        R=R,
        width=width,
        vectors_per_query=R // value.shape[0],
        logits_stride=value.stride(0),
        projections_stride=0 if along is None else along.stride(0),
        splits=splits,
        span=span,
        ATOMS=1024,
        num_warps=4,
    )
    return parts, sums.sum(1, dtype=torch.float64)


def sum_tiling(rows: int, atom_bytes: int, in_registers: bool, device: Device) -> Tiling:
    """The tile of `weighted_sums_kernel`, whose atoms are read as they are stored; the arguments
    are those of `tiling`."""
    stacked = rows <= 16
    ROWS = 4 if rows <= 4 else 16 if stacked else 64
    D = 256 if rows <= 4 else 128
    if in_registers:  # Hopper's tensor cores leave room there: they read operands from memory
        D = 64 if device.cc // 10 == 9 else 32
    stages = 3
    width = 4 * ROWS if stacked else 3 * ROWS
    while stages * 64 * (D * atom_bytes + 2 * width) > device.shared - 2**13:
        stages -= 1
    sizes = {"D": D, "ATOMS": 64, "ROWS": ROWS, "STAGES": stages}
    return Tiling(sizes, stacked, 4 if ROWS == 4 else 8)


def _few_sums(p: Problem, weights: Tensor, chosen: Tensor, at: slice, squared: bool) -> Tensor:
    """Sums [R, d] in double over some atoms, by one read of them."""
    z, R, N, d = operand(p), weights.shape[1], at.stop - at.start, p.y.shape[1]
    device = device_of(p.x)
    t = sum_tiling(R, z.bytes, z.in_registers or squared, device)
    blocks = triton.cdiv(d, t.sizes["D"]) * triton.cdiv(R, t.sizes["ROWS"])
    tiles = triton.cdiv(N, t.sizes["ATOMS"])
    splits = max(
        triton.cdiv(tiles, CHAINS), min(tiles, triton.cdiv(4 * device.multiprocessors, blocks))
    )
    span = triton.cdiv(tiles, splits) * t.sizes["ATOMS"]
    splits = triton.cdiv(N, span)
    out = p.x.new_empty(splits, R, d)
    weighted_sums_kernel[(blocks * splits,)](
        **z._replace(atoms=z.atoms[at]).arguments,
        weights=weights,
        by_products=chosen,
        residue=z.residue if squared else None,
        log_pi=None if p.log_pi is None else p.log_pi[at],
        out=out,
        N=N,
        d=d,
        R=R,
        width=weights.shape[2],
        span=span,
        one=1.0,
        factor=z.factor,
        SQUARED=squared,
        STACKED=t.stacked,
        PRIOR=p.log_pi is not None,
        SCALED=squared and z.factor != 1.0,
        **t.sizes,
        num_warps=t.warps,
    )
    return out.sum(0, dtype=torch.float64)


def _many_sums(weights: Tensor, atoms: Tensor, parts: int) -> Tensor:
    """Sums [R, d] in double by the library: weights [3, R, width], parts of atoms [parts, N, d]."""
    R, N, d = weights.shape[1], *atoms.shape[-2:]
    rows, total = weights.view(3 * R, -1), 0.0
    for begin in range(0, N, CHAIN * CHAINS):
        some = torch.zeros(3 * R, d, dtype=torch.float32, device=weights.device)
        for at in range(begin, min(begin + CHAIN * CHAINS, N), CHAIN):
            end = min(at + CHAIN, N)
            for j in range(parts):
                part = atoms[j] if atoms.dim() == 3 else atoms
                left = (3 - j) * R
                some[:left] += float32_product(rows[:left, at:end], part[at:end])
        total = total + some.view(3, R, d).sum(0, dtype=torch.float64)
    return total


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
    R, N = p.x.shape[0] if projections is None else p.targets, p.y.shape[0]
    z, device = operand(p), device_of(p.x)
    numbers, vector = 0.0, 0.0
    if few(R):
        chosen = logits.by_products.repeat_interleave(R // p.x.shape[0])
        step = max(CHAIN, PREPARED // (6 * R) // CHAIN * CHAIN)
        for begin in range(0, N, step):
            at = slice(begin, min(begin + step, N))
            weights, sums = _write_weights(logits, projections, at, R, device)
            numbers = numbers + sums
            vector = vector + _few_sums(p, weights, chosen, at, squared)
    else:
        for c in chunks(p, z, 6 * R, squared=squared):
            weights, sums = _write_weights(logits, projections, c.at, R, device)
            numbers = numbers + sums
            vector = vector + _many_sums(weights, c.z.atoms, c.z.parts)
    weight = numbers[3] if projections is not None else numbers[0]
    if not squared:
        vector = z.factor * vector
        if z.residue is not None:
            vector += weight[:, None] * z.residue.double()
    return Sums(*numbers, vector)
