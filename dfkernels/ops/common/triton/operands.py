# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""The atoms as products on tensor cores read them.

    y - centre = factor z + residue,  z = the sum of bfloat16 parts

Atoms stored in bfloat16 and float16 are z untouched, with scale, offset and centre in factor and
residue, which are algebra outside the loops. From uint8 a whole number is taken, which leaves one
part, and float32 atoms are moved to the centre before they are split: there the residue is 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .functions import valid_atoms
from .parts import PARTS, split_parts
from .problem import Problem


class Operand(NamedTuple):
    """Atoms as a product reads them: as they are stored, or their parts in scratch memory."""

    atoms: Tensor  # [N, d], rows apart; or parts [PARTS, N, d]
    parts: int
    shift: Tensor | None  # [d]: taken off what is stored
    residue: Tensor | None  # [d]; None: 0
    factor: float
    scale: float  # of atoms that are moved to the centre: scale * stored + offset - shift
    offset: float

    @property
    def in_registers(self) -> bool:
        """Whether kernels split the numbers that they read."""
        return self.parts > 1 and self.atoms.dtype != torch.bfloat16

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
    PARTS: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """Three parts of z at coordinates k of the atoms start + i; only the first PARTS count. Zero
    beyond d and where not `valid`."""
    mask = valid & (k < d)
    p_atoms = atoms + start * row_stride + (i * row_stride + k)
    t = tl.load(p_atoms, mask=mask, other=0.0)
    if atoms.dtype.element_ty == tl.bfloat16:  # as stored, or parts already
        first, second, third = t, t, t
        if PARTS > 1:
            second = tl.load(p_atoms + part_stride, mask=mask, other=0.0)
        if PARTS > 2:
            third = tl.load(p_atoms + 2 * part_stride, mask=mask, other=0.0)
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
def prepare_kernel(
    atoms,  # as `load_parts` reads them
    shift,  # [d], or None
    residue,  # [d], or None
    log_pi,  # [N], or None
    parts,  # out [*, N, d]: the parts of z, or of (y - centre)^2, or None
    y_square,  # out [N]: |y - centre|^2, 0 for a masked atom, or None
    N,
    d,
    row_stride,
    part_stride,
    scale,
    offset,
    factor,
    SQUARED: tl.constexpr,
    PRIOR: tl.constexpr,
    PARTS: tl.constexpr,
    AFFINE: tl.constexpr,
    SCALED: tl.constexpr,
    D: tl.constexpr,
    ATOMS: tl.constexpr,
):
    """Writes parts to scratch memory, so that products of many queries need not split the atoms
    again and again. One program has ATOMS atoms."""
    start = tl.program_id(0).to(tl.int64) * ATOMS
    i = tl.arange(0, ATOMS)[:, None]
    valid = valid_atoms(log_pi, start, i, N, PRIOR)
    exists = i < N - start
    squares = tl.zeros((ATOMS, 1), tl.float32)
    count = tl.full((), N, tl.int64) * d
    for c in range(tl.cdiv(d, D)):
        k = (c * D + tl.arange(0, D))[None, :]
        first, second, third = load_parts(
            atoms, start, i, k, valid, row_stride, part_stride, d, shift, scale, offset,
            PARTS, AFFINE,
        )  # fmt: skip
        t = about_centre(first, second, third, k, valid, d, residue, factor, PARTS, SCALED)
        if y_square is not None:
            squares += tl.sum(t * t, 1, keep_dims=True)
        if parts is not None:
            if SQUARED:  # of an outlier, whose weight is 0, not infinite
                square = t * t
                first, second, third = split_parts(tl.where(square > 3e38, 3e38, square))
            p_parts = parts + start * d + (i * d + k)
            mask = exists & (k < d)
            tl.store(p_parts, first, mask=mask)
            if SQUARED or PARTS > 1:
                tl.store(p_parts + count, second, mask=mask)
            if SQUARED or PARTS > 2:
                tl.store(p_parts + 2 * count, third, mask=mask)
    if y_square is not None:
        tl.store(y_square + start + i, squares, mask=exists)


def prepared(
    z: Operand,
    log_pi: Tensor | None,
    *,
    squared: bool = False,
    y_square: Tensor | None = None,
    copy: bool = True,
) -> Operand:
    """The operand with its parts in scratch memory; where bfloat16 atoms can be read as they are,
    themselves.

    Args:
        z: atoms as they are stored.
        log_pi: theirs [N]; masked atoms become 0, whatever they hold.
        squared: parts of (y - centre)^2 instead.
        y_square: [N], to be filled with |y - centre|^2.
        copy: False: y_square alone is wanted.
    """
    N, d = z.atoms.shape
    plain = z.atoms.dtype == torch.bfloat16 and log_pi is None and not squared
    parts = 3 if squared else z.parts
    copy = copy and not plain
    out = z.atoms.new_empty(parts, N, d, dtype=torch.bfloat16) if copy else None
    if copy or y_square is not None:
        prepare_kernel[(triton.cdiv(N, 16),)](
            **z.arguments,
            residue=z.residue,
            log_pi=log_pi,
            parts=out,
            y_square=y_square,
            N=N,
            d=d,
            factor=z.factor,
            SQUARED=squared,
            PRIOR=log_pi is not None,
            SCALED=z.factor != 1.0,
            D=256,
            ATOMS=16,
            num_warps=4,
        )
    if out is None:
        return z
    factor = 1.0 if squared else z.factor
    return Operand(out, parts, None, None if squared else z.residue, factor, 1.0, 0.0)
