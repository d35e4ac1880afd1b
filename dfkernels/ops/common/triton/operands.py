# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""The atoms as products on tensor cores read them.

    y - centre = factor z + residue,  z = the sum of parts

Atoms stored in bfloat16 and float16 are z, with scale, offset and centre in factor and residue,
which are algebra outside the loops. From uint8 a whole number is taken, which leaves one part, and
float32 atoms are moved to the centre before they are split: there the residue is 0.

A few rows of queries or weights read the atoms as they are stored: a bfloat16 goes to the tensor
cores untouched, anything else becomes bfloat16 parts in registers. For many rows the atoms become
float16 halves in scratch memory, every atom with a scale of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .functions import valid_atoms
from .halves import padded, scale_of, split_halves
from .parts import PARTS, split_parts
from .problem import Problem


class Operand(NamedTuple):
    """Atoms as a product reads them: as they are stored, or their halves in scratch memory."""

    atoms: Tensor  # [N, d], rows apart; or halves [parts, N, padded(d)], 0 beyond d
    parts: int
    shift: Tensor | None  # [d]: taken off what is stored
    residue: Tensor | None  # [d]; None: 0
    factor: float
    scale: float  # of atoms that are moved to the centre: scale * stored + offset - shift
    offset: float
    scales: Tensor | None = None  # [N], of atoms in halves: z = its scale times their sum

    @property
    def in_registers(self) -> bool:
        """Whether kernels split the numbers that they read."""
        return self.parts > 1 and self.scales is None

    @property
    def bytes(self) -> int:
        """Of what is read of one number: of all parts that are in memory."""
        return self.atoms.element_size() * (1 if self.in_registers else self.parts)

    @property
    def arguments(self) -> dict[str, Any]:
        """What every kernel that reads an operand takes, by keyword."""
        return {
            "atoms": self.atoms,
            "shift": self.shift,
            "row_stride": self.atoms.stride(-2),
            "part_stride": self.atoms.stride(0) if self.atoms.dim() == 3 else 0,
            "scale": self.scale,
            "offset": self.offset,
            "PARTS": self.parts,
            "HALVES": self.scales is not None,
            "AFFINE": (self.scale, self.offset) != (1.0, 0.0),
        }


def operand(p: Problem) -> Operand:
    """The atoms of a float32 call, where they are."""
    q, parts = p.queries, PARTS[p.y.dtype]
    if p.y.dtype == torch.float32:
        return Operand(p.y, parts, q.centre, None, 1.0, p.scale, p.offset)
    if p.y.dtype == torch.uint8:
        return Operand(p.y, parts, q.stored_centre, None, p.scale, 1.0, 0.0)
    return Operand(p.y, parts, None, p.offset - q.centre, p.scale, 1.0, 0.0)


@triton.jit
def load_parts(
    atoms, start, i, k, valid, row_stride, part_stride, d, shift, scale, offset,
    PARTS: tl.constexpr, HALVES: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """Three parts of z at coordinates k of the atoms start + i; only the first PARTS count. Zero
    beyond d and where not `valid`."""
    mask = valid & (k < d)
    p_atoms = atoms + start * row_stride + (i * row_stride + k)
    t = tl.load(p_atoms, mask=mask, other=0.0)
    if HALVES:
        first, second, third = t, t, t
        if PARTS > 1:
            second = tl.load(p_atoms + part_stride, mask=mask, other=0.0)
    elif atoms.dtype.element_ty == tl.bfloat16:
        first, second, third = t, t, t
    else:
        t = t.to(tl.float32)
        if AFFINE:
            t = t * scale + offset
        if shift is not None:
            t -= tl.load(shift + k, mask=k < d, other=0.0)
        if AFFINE or shift is not None:
            t = tl.where(mask, t, 0.0)
        first, second, third = split_parts(t)
    return first, second, third


@triton.jit
def about_centre(
    first, second, third, k, valid, d, residue, factor, PARTS: tl.constexpr, SCALED: tl.constexpr
):
    """y - centre in float32 from the parts of z; zero where not `valid`."""
    t = first.to(tl.float32)
    if PARTS > 1:
        t += second.to(tl.float32)
    if PARTS > 2:
        t += third.to(tl.float32)
    if SCALED:
        t *= factor
    if residue is not None:
        t = tl.where(valid, t + tl.load(residue + k, mask=k < d, other=0.0), 0.0)
    return t


@triton.jit
def load_centred(
    atoms, start, i, k, valid, row_stride, part_stride, d, shift, scale, offset, residue, factor,
    SQUARED: tl.constexpr, PARTS: tl.constexpr, HALVES: tl.constexpr, AFFINE: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """(z, or (y - centre)^2 if SQUARED; y - centre) in float32."""
    first, second, third = load_parts(
        atoms, start, i, k, valid, row_stride, part_stride, d, shift, scale, offset,
        PARTS, HALVES, AFFINE,
    )  # fmt: skip
    t = about_centre(first, second, third, k, valid, d, residue, factor, PARTS, SCALED)
    if SQUARED:  # of an outlier, whose weight is 0, not infinite
        z = tl.where(t * t > 3e38, 3e38, t * t)
    else:
        z = about_centre(first, second, third, k, valid, d, None, factor, PARTS, False)
    return z, t


@triton.jit
def prepare_kernel(
    atoms,  # as `load_parts` reads them
    shift,  # [d], or None
    residue,  # [d], or None
    log_pi,  # [N], or None
    halves,  # out [OUT, N, width] float16: of z, or of (y - centre)^2; 0 beyond d
    scales,  # out [N]: what their sum has to be multiplied by
    y_square,  # out [N]: |y - centre|^2, 0 for a masked atom, or None
    N,
    d,
    width,
    row_stride,
    part_stride,
    scale,
    offset,
    factor,
    SQUARED: tl.constexpr,
    PRIOR: tl.constexpr,
    PARTS: tl.constexpr,
    HALVES: tl.constexpr,
    AFFINE: tl.constexpr,
    SCALED: tl.constexpr,
    OUT: tl.constexpr,
    D: tl.constexpr,
    ATOMS: tl.constexpr,
):
    """Writes halves to scratch memory, so that products of many queries need not split the atoms
    again and again. One program has ATOMS atoms, and reads them twice, the second time from the
    cache: for their scales, and to divide by them."""
    start = tl.program_id(0).to(tl.int64) * ATOMS
    i = tl.arange(0, ATOMS)[:, None]
    valid = valid_atoms(log_pi, start, i, N, PRIOR)
    exists = i < N - start
    squares = tl.zeros((ATOMS, 1), tl.float32)
    largest = tl.zeros((ATOMS, 1), tl.float32)
    for c in range(tl.cdiv(d, D)):
        k = (c * D + tl.arange(0, D))[None, :]
        z, t = load_centred(
            atoms, start, i, k, valid, row_stride, part_stride, d, shift, scale, offset, residue,
            factor, SQUARED, PARTS, HALVES, AFFINE, SCALED,
        )  # fmt: skip
        squares += tl.sum(t * t, 1, keep_dims=True)
        largest = tl.maximum(largest, tl.max(tl.abs(z), 1, keep_dims=True))
    unit, inverse = scale_of(largest)
    tl.store(scales + start + i, unit, mask=exists)
    if y_square is not None:
        tl.store(y_square + start + i, squares, mask=exists)
    count = tl.full((), N, tl.int64) * width
    for c in range(tl.cdiv(width, D)):
        k = (c * D + tl.arange(0, D))[None, :]
        z, _ = load_centred(
            atoms, start, i, k, valid, row_stride, part_stride, d, shift, scale, offset, residue,
            factor, SQUARED, PARTS, HALVES, AFFINE, SCALED,
        )  # fmt: skip
        first, second = split_halves(z * inverse)
        p_halves = halves + start * width + (i * width + k)
        tl.store(p_halves, first, mask=exists & (k < width))
        if OUT > 1:
            tl.store(p_halves + count, second, mask=exists & (k < width))


def halves_of(dtype: torch.dtype, squared: bool = False) -> int:
    """How many halves hold the atoms of a storage dtype, or their squares."""
    return 2 if squared or PARTS[dtype] == 3 else 1


def prepared(
    z: Operand,
    log_pi: Tensor | None,
    *,
    squared: bool = False,
    y_square: Tensor | None = None,
) -> Operand:
    """The operand with its halves in scratch memory.

    Args:
        z: atoms as they are stored.
        log_pi: theirs [N]; masked atoms become 0, whatever they hold.
        squared: halves of (y - centre)^2 instead.
        y_square: [N], to be filled with |y - centre|^2.
    """
    N, d = z.atoms.shape
    parts, width = halves_of(z.atoms.dtype, squared), padded(d)
    out = z.atoms.new_empty(parts, N, width, dtype=torch.float16)
    scales = z.atoms.new_empty(N, dtype=torch.float32)
    prepare_kernel[(triton.cdiv(N, 16),)](
        **z.arguments,
        residue=z.residue,
        log_pi=log_pi,
        halves=out,
        scales=scales,
        y_square=y_square,
        N=N,
        d=d,
        width=width,
        factor=z.factor,
        SQUARED=squared,
        PRIOR=log_pi is not None,
        SCALED=z.factor != 1.0,
        OUT=parts,
        D=256,
        ATOMS=16,
        num_warps=4,
    )
    residue, factor = (None, 1.0) if squared else (z.residue, z.factor)
    return Operand(out, parts, None, residue, factor, 1.0, 0.0, scales)
