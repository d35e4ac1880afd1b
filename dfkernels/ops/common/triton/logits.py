# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""Computes the logits of all pairs (query, atom): by differences, or in the expanded form.

Near the cloud, for its noise, a query's expanded logits are as accurate as differences: it is one
of those that take products. For the others expanded logits are a filter: they bound every logit,
and the atoms that may matter are computed again by differences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .device import Device, device_of
from .differences import differences_kernel
from .expanded import expanded_kernel
from .halves import halves
from .operands import Operand, halves_of, operand, prepared
from .parts import split
from .problem import NEAR, Problem

BLOCK = 256  # atoms of one program of `differences_kernel`
FEW = 64  # up to so many rows share one read of the atoms, which bandwidth bounds
PREPARED = 2**30  # bytes of scratch memory for the parts of atoms and of weights
CHUNK = 4096  # atoms that are prepared together, or a multiple of it
U = 2.0**-8  # what rounding to bfloat16 changes, relatively
HALF = 2.0**-11  # to float16
EPS = 2.0**-23  # what a truncated float32 addition does


def few(rows: int) -> bool:
    """Whether products of so many rows read the atoms as they are stored, by one program each."""
    return rows <= FEW


def difference_sizes(targets: int) -> dict[str, int]:
    """The tile of `differences_kernel`: TARGETS share a tile of y."""
    shared = {"D": 512, "TARGETS": 1} if targets == 1 else {"D": 128, "TARGETS": 4}
    return {**shared, "ATOMS": 16, "STRIP": BLOCK // 16}


def by_differences(
    p: Problem,
    reference: Tensor | None = None,
    bounds: Tensor | None = None,
    floor: Tensor | None = None,
    largest: Tensor | None = None,
) -> Tensor:
    """Every logit, [B, N], or, given a reference, every <y - reference, v>, [targets, N]; with
    lists, those of their atoms (`Problem.per_pair`).

    With bounds, only those that may matter; logits then take the place of their bounds, and the
    largest of each block of BLOCK atoms goes to `largest` [B, blocks], if it is given.
    """
    q, targets = p.queries, p.x.shape[0] if reference is None else p.targets
    out = p.per_pair(targets) if bounds is None or reference is not None else bounds
    sizes = difference_sizes(targets if p.lists is None else 1)
    tiles = triton.cdiv(p.longest, sizes["ATOMS"] * sizes["STRIP"])
    differences_kernel[(tiles * triton.cdiv(targets, sizes["TARGETS"]),)](
        **p.atom_arguments,
        **p.list_arguments,
        point=q.anchor if reference is None else reference,
        rest=q.rest if reference is None else None,
        v=p.v,
        alpha=p.alpha,
        sigma=p.sigma,
        bounds=bounds,
        floor=floor,
        out=out,
        largest=largest,
        targets=targets,
        vectors_per_query=targets // p.x.shape[0],
        gap=p.gap,
        PROJECT=reference is not None,
        FILTERED=bounds is not None,
        **sizes,
        num_warps=4,
    )
    return out


class Logits(NamedTuple):
    """Logits of all pairs, and what the kernels that use matrix products need beside them."""

    value: Tensor  # [B, N], base 2, exact where they matter, less what all atoms share
    max_logit: Tensor  # [B]; with lists, where nobody looks for it, -inf
    common: Tensor  # [B], double: what all atoms share, in natural logarithms
    by_products: Tensor | None = None  # [B], int32: 1 for the queries that take products, else 0
    y_square: Tensor | None = None  # [N]: |y - centre|^2


class Tiling(NamedTuple):
    """How a kernel of products goes through rows, atoms and coordinates."""

    sizes: dict[str, int]
    stacked: bool
    warps: int


def tiling(
    rows: int, row_parts: int, atom_bytes: int, in_registers: bool, device: Device
) -> Tiling:
    """The tile of `expanded_kernel`. A few rows are stacked, so that one product serves all parts
    of them; D and STAGES are what shared memory has room for.

    Args:
        rows, row_parts: of the rows, and the parts of each that are read.
        atom_bytes: of all parts of one number of an atom, in memory.
        in_registers: whether atoms are split in registers, which then hold smaller tiles.
        device: the GPU.
    """
    stacked = few(rows) and rows <= 16
    ROWS = 4 if rows <= 4 else 16 if rows <= 16 else 64 if few(rows) else 128
    width = 4 * ROWS if stacked else row_parts * ROWS
    # both halves of atoms: Ampere would spill, and of Blackwell's shared memory copies take a part
    narrow = in_registers or (atom_bytes > 2 and device.cc // 10 != 9)
    D, stages = 32 if narrow else 128 if stacked else 64, 3
    while stages * D * (128 * atom_bytes + 2 * width) > device.shared - 2**13:
        D, stages = (D // 2, 3) if stages == 2 else (D, 2)
    return Tiling({"D": D, "ATOMS": 128, "ROWS": ROWS, "STAGES": stages}, stacked, 8)


def expand(
    z: Operand,
    log_pi: Tensor | None,
    rows: Tensor,
    coefficients: Tensor,
    out: Tensor,
    exact: Tensor | None = None,
    y_square: Tensor | None = None,
    lower: Tensor | None = None,
    *,
    row_parts: int,
    serve: tuple[bool, bool] = (False, True),
    squares: bool = False,
) -> None:
    """Launches `expanded_kernel`; serve: (BOUNDS, EXACT)."""
    (_, R, d), N = rows.shape, z.atoms.shape[-2]
    t = tiling(R, row_parts, z.bytes, z.in_registers, device_of(rows))
    expanded_kernel[(triton.cdiv(N, t.sizes["ATOMS"]) * triton.cdiv(R, t.sizes["ROWS"]),)](
        **z.arguments,
        rows=rows,
        coefficients=coefficients,
        exact=exact,
        residue=z.residue if squares else None,
        log_pi=log_pi,
        scales=z.scales,
        y_square=y_square,
        out=out,
        lower=lower,
        N=N,
        d=d,
        R=R,
        out_stride=out.stride(0),
        lower_stride=0 if lower is None else lower.stride(0),
        one=1.0,
        factor=z.factor,
        BOUNDS=serve[0],
        EXACT=serve[1],
        SQUARES=squares,
        ROW_PARTS=row_parts,
        STACKED=t.stacked,
        PRIOR=log_pi is not None,
        SCALED=squares and z.factor != 1.0,
        **t.sizes,
        num_warps=t.warps,
    )


class Chunk(NamedTuple):
    """Some atoms of a call as an operand, and where they lie."""

    z: Operand
    log_pi: Tensor | None
    at: slice


def chunks(
    p: Problem,
    rows: int,
    row_bytes: int = 0,
    *,
    squared: bool = False,
    y_square: Tensor | None = None,
) -> Iterator[Chunk]:
    """All atoms, for products with so many rows, as many at a time as PREPARED has room for. For a
    few rows they are what is stored, for many they are prepared.

    Args:
        p: the call.
        rows: of the product.
        row_bytes: of further scratch memory for each atom.
        squared, y_square: for `prepared`.
    """
    (N, d), z = p.y.shape, operand(p)
    bytes = row_bytes + (0 if few(rows) else 2 * d * halves_of(p.y.dtype, squared))
    step = N if bytes == 0 else max(CHUNK, PREPARED // bytes // CHUNK * CHUNK)
    for begin in range(0, N, step):
        at = slice(begin, min(begin + step, N))
        log_pi = None if p.log_pi is None else p.log_pi[at]
        some = z._replace(atoms=z.atoms[at])
        if not few(rows):
            square = None if y_square is None else y_square[at]
            some = prepared(some, log_pi, squared=squared, y_square=square)
        yield Chunk(some, log_pi, at)


def _levels(p: Problem, z: Operand) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x' [B, d], which queries take products, `common` of all queries, and for the kernel slope,
    curve, level and the norms [4, B] that the bound is made of, in double."""
    q, d = p.queries, p.x.shape[1]
    x = p.x - p.alpha[:, None] * q.centre
    alpha, variance = p.alpha.double(), p.sigma.double().square()
    wide = x.double()
    half_square = 0.5 * wide.square().sum(1) / variance
    exact, cross, far = q.near, torch.zeros_like(alpha), torch.zeros_like(alpha[:1])
    if z.residue is not None:
        residue = z.residue.double()
        cross, far = alpha * (wide * residue).sum(1) / variance, residue.norm()[None]
        exact = exact & ((alpha * far).square() <= NEAR * d * variance)
    level = torch.where(exact, 0, cross - torch.where(q.near, 0, half_square))
    common = q.common + torch.where(exact, cross, 0)
    slope, curve = alpha * z.factor / variance, 0.5 * alpha.square() / variance
    # the roundings of x' and of y, of which the centre is a part
    blur = 2 * EPS * alpha.abs() * q.centre.double().norm()
    reach = alpha.abs() * wide.norm(dim=1) / variance
    blurred = blur * torch.stack([alpha.abs(), wide.norm(dim=1)]) / variance
    slack = (
        blurred[1] + (2e-6 + d * 2e-9) * torch.where(q.near, 0, half_square) + 1e-6 * level.abs()
    )
    bound = torch.stack([reach, blurred[0], slack, far.expand_as(reach)])
    return x, exact, common, (torch.stack([slope, curve, level]), bound)


def _coefficients(levels: tuple[Tensor, Tensor], scale: Tensor, relative: float) -> Tensor:
    """What `expanded_kernel` takes, in base 2, for rows with such a scale [B], where products are
    right to `relative` of the product of the norms."""
    (slope, curve, level), (reach, blurred, slack, far) = levels
    reach = relative * reach + blurred
    out = torch.stack([slope * scale, curve, level, reach, slack + reach * far])
    return (out / math.log(2)).float().contiguous()


def row_parts(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The parts [*, R, *] of the rows of a product, and their scale [R] in double."""
    if few(len(rows)):
        return split(rows), torch.ones(len(rows), dtype=torch.float64, device=rows.device)
    parts, scale = halves(rows)
    return parts, scale.double()


def expanded(p: Problem) -> Logits:
    """Logits in the expanded form: those of the queries that take products, upper bounds for the
    others, of which those that may matter are computed again."""
    (B, d), N = p.x.shape, p.y.shape[0]
    z = operand(p)
    x, exact, common, levels = _levels(p, z)
    (rows, scale), by_products = row_parts(x), exact.to(torch.int32)
    out, y_square = p.x.new_empty(B, N), p.x.new_empty(N)
    lower = p.x.new_empty(B, triton.cdiv(N, 128))
    # at most D additions in a tile for each part, and one for each tile
    sums = lambda parts: EPS * (128 * parts + triton.cdiv(d, 32))
    if few(B):
        expand(
            z, p.log_pi, rows, _coefficients(levels, scale, 2 * U**3 + sums(3)), out, by_products,
            y_square, lower, row_parts=3, serve=(True, True), squares=True,
        )  # fmt: skip
    else:
        one = HALF * halves_of(p.y.dtype)
        by_one = _coefficients(levels, scale, one + HALF**2 + sums(1))
        for c in chunks(p, B, y_square=y_square):
            given = (out[:, c.at], by_products, y_square[c.at], lower[:, c.at.start // 128 :])
            first = c.z._replace(parts=1)
            expand(first, c.log_pi, rows, by_one, *given, row_parts=1, serve=(True, False))
            expand(c.z, c.log_pi, rows, by_one, *given, row_parts=2)
    found = lower.amax(1)
    floor = torch.where(exact, math.inf, found)
    largest = p.x.new_empty(B, triton.cdiv(N, BLOCK))
    value = by_differences(p, bounds=out, floor=floor, largest=largest)
    max_logit = torch.where(exact, found, largest.amax(1))
    return Logits(value, max_logit, common, by_products, y_square)


def compute_logits(p: Problem) -> Logits:
    """The logits of a call, by whichever way is faster."""
    if p.x.dtype == torch.float32 and p.x.shape[0] > 1 and p.lists is None:
        return expanded(p)
    value = by_differences(p)
    unknown = p.x.new_full((p.x.shape[0],), -math.inf)
    max_logit = value.amax(1) if p.lists is None else unknown
    return Logits(value, max_logit, p.queries.common)


def compute_projections(p: Problem, logits: Logits, reference: Tensor) -> Tensor:
    """<y - reference, v>, [targets, N], where the logit matters."""
    if logits.by_products is None:
        return by_differences(p, reference, logits.value, logits.max_logit)
    floor = torch.where(logits.by_products > 0, math.inf, logits.max_logit)
    out = by_differences(p, reference, logits.value, floor)
    z, v, targets = operand(p), p.v.flatten(0, 1), p.targets
    origin = p.queries.centre if z.residue is None else p.queries.centre + z.residue
    level = ((origin - reference).double() * v).sum(1)
    slope = torch.full_like(level, z.factor)
    rows, scale = row_parts(v)
    coefficients = torch.stack([scale * slope, *[torch.zeros_like(level)] * 4])
    coefficients[2] = level
    coefficients = coefficients.float()
    exact = logits.by_products.repeat_interleave(targets // p.x.shape[0])
    for c in chunks(p, targets):  # a masked atom's is not read
        expand(c.z, None, rows, coefficients, out[:, c.at], exact, row_parts=len(rows))
    return out
