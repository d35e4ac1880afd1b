# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""Launches the kernels that accumulate moments: which tile for which shape, how atoms are split."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .device import Device, device_of
from .logits import Logits, compute_logits
from .merge import merge_mean_kernel
from .problem import Problem, make_problem
from .products import product_moments_kernel
from .sweep import sweep_kernel

MAX_TILES = 128  # tiles of a split: chains of additions stay short
SCRATCH = 2**28  # numbers of scratch memory


class Tile(NamedTuple):
    """What one program of the sweep handles at once."""

    D: int  # coordinates: a power of two
    ATOMS: int
    TARGETS: int
    COORD_AXIS: int
    STAGES: int
    warps: int
    logits_given: bool  # logits come from another launch, and d may be cut into blocks of D
    strip: int = 1  # tiles whose given logits are looked at together


class Shape(NamedTuple):
    """What the choice of a tile depends on; itemsize is that of the compute dtype."""

    targets: int
    d: int
    itemsize: int
    device: Device

    @property
    def D(self) -> int:
        return triton.next_power_of_2(self.d)


class TileRule(NamedTuple):
    """One row of the table of tiles: the first rule that applies to a shape chooses its tile."""

    name: str
    applies: Callable[[Shape], bool]
    tile: Callable[[Shape], Tile]


def _target_per_thread(s: Shape) -> Tile:
    atoms = max(2, min(16, 32 // s.D))
    return Tile(s.D, atoms, 128, COORD_AXIS=0, STAGES=1, warps=4, logits_given=False)


def _shared_atoms(s: Shape) -> Tile:
    return Tile(128, 8, 4, COORD_AXIS=2, STAGES=1, warps=4, logits_given=True, strip=128)


def _blocks_of_coordinates(s: Shape) -> Tile:
    D = min(s.D, 4096 // s.itemsize)
    atoms = min(16, 32768 // s.itemsize // D)
    warps = 8 if D >= 512 else 4
    return Tile(
        D, atoms, 1, COORD_AXIS=2, STAGES=1, warps=warps, logits_given=True, strip=1024 // atoms
    )


def _whole_rows(s: Shape) -> Tile:
    row = s.D * s.itemsize
    warps = 16 if row >= 16384 else 8 if row >= 4096 else 4
    atoms = min(256, 16384 * warps // (s.itemsize * row))
    if warps == 16 and s.device.cc // 10 == 10:
        atoms //= 2  # Triton 3.7 would spill in the loop
    stages = min(3, 1 + (s.device.shared - 2**15) // (atoms * row)) if s.D >= 512 else 1
    return Tile(s.D, atoms, 1, COORD_AXIS=2, STAGES=stages, warps=warps, logits_given=False)


# Registers set the constants of the rules. In float32 a thread holds up to 32 numbers of a tile:
# the 32 of `_target_per_thread`; the 8 x 4 x 128 of `_shared_atoms` and the 32768 bytes of
# `_blocks_of_coordinates`, on 4 and 8 warps; the 16384 of `_whole_rows`, 32 threads times 32
# numbers times itemsize^2. A thread also holds its share of four vectors, the query, the reference
# and two moments: therefore D * itemsize^2 <= 2^16 unless logits are given.
TILE_RULES = (
    TileRule(
        "a target per thread",
        lambda s: s.D * s.itemsize**2 <= 256 and s.targets >= 64,
        _target_per_thread,
    ),
    TileRule(
        "a few targets share the atoms, behind the filter",
        lambda s: s.itemsize == 4 and 1 < s.targets <= 16 and s.d > 16,
        _shared_atoms,
    ),
    TileRule(
        "a row that no program holds",
        lambda s: s.D * s.itemsize**2 > 2**16,
        _blocks_of_coordinates,
    ),
    TileRule(
        "many targets, behind the filter",
        lambda s: s.itemsize == 4 and s.targets > 16 and s.d > 16,
        _blocks_of_coordinates,
    ),
    TileRule("whole rows in registers", lambda s: True, _whole_rows),
)


def tile_for(targets: int, d: int, itemsize: int, device: Device) -> Tile:
    """The tile of the first rule in TILE_RULES that applies."""
    shape = Shape(targets, d, itemsize, device)
    return next(rule.tile(shape) for rule in TILE_RULES if rule.applies(shape))


def tile_by_differences(targets: int, d: int, itemsize: int, device: Device) -> Tile:
    """A tile for which the sweep computes the logits itself, with whole rows."""
    shape = Shape(targets, d, itemsize, device)
    return _target_per_thread(shape) if TILE_RULES[0].applies(shape) else _whole_rows(shape)


def splits_for(N: int, blocks: int, tile: Tile, device: Device) -> int:
    """How many splits of N atoms the sweep has, for so many blocks of targets."""
    return _split_count(triton.cdiv(N, tile.ATOMS), blocks, device, tile.strip)


def spans(N: int, blocks: int, atoms: int, device: Device) -> tuple[int, int]:
    """(atoms of a split, number of splits), for tiles of so many atoms that are looked at one by
    one."""
    return even_splits(N, _split_count(triton.cdiv(N, atoms), blocks, device), atoms)


def _split_count(tiles: int, blocks: int, device: Device, strip: int = 1) -> int:
    """How many splits give every multiprocessor work, none of them with more than MAX_TILES
    tiles."""
    fill = triton.cdiv(4 * device.multiprocessors, blocks)
    return max(triton.cdiv(tiles, MAX_TILES), min(fill, triton.cdiv(tiles, 4 * strip)))


def product_sizes(targets: int, one_sum: bool) -> dict[str, int]:
    """The tile of `product_moments_kernel`: two sums of 64 x 32 numbers, or one of 64 x 64, do not
    spill."""
    queries = max(16, min(64, triton.next_power_of_2(targets)))
    return {"D": 64 if one_sum else 32, "ATOMS": 32, "QUERIES": queries, "STAGES": 3}


def product_splits_for(N: int, programs: int, atoms: int, device: Device) -> int:
    """`splits_for` for matrix products, where what is added within a tile counts as one
    addition."""
    return max(
        triton.cdiv(2 * device.multiprocessors, programs), triton.cdiv(N, 8 * MAX_TILES * atoms)
    )


def even_splits(N: int, splits: int, atoms: int) -> tuple[int, int]:
    """(atoms of a split, a multiple of the tile's; number of splits, none of them empty)."""
    span = triton.cdiv(triton.cdiv(N, splits), atoms) * atoms
    return span, triton.cdiv(N, span)


def queries_at_once(B: int, K: int, N: int, d: int, itemsize: int, device: Device) -> int:
    """How many queries SCRATCH has room for, at least one."""
    tile = tile_for(B * K, d, itemsize, device)
    splits = splits_for(N, triton.cdiv(B * K, tile.TARGETS), tile, device)
    return whole_tiles(SCRATCH // (K * (3 * splits * d + 2 * N * tile.logits_given)))


def whole_tiles(queries: int) -> int:
    """At least one query, and of many so many that tiles are full."""
    return max(1, queries) if queries < 128 else queries // 128 * 128


def in_query_groups(
    launch: Callable,
    x,
    y,
    v,
    alpha,
    sigma,
    log_prior,
    scale: float,
    offset: float,
    *,
    normalised: bool = False,
    scratch: int | None = None,
):
    """Calls launch(problem) on as many queries at a time as the scratch memory allows.

    Args:
        launch: takes a problem.
        x, y, v, alpha, sigma, log_prior, scale, offset: those of an op.
        normalised: log_prior is log pi already.
        scratch: numbers of scratch memory for each query, unless it is moments that are launched.
    """
    B, K = x.shape[0], 1 if v is None else v.shape[1]
    p = make_problem(x, y, v, alpha, sigma, log_prior, scale, offset, normalised=normalised)
    if scratch is None:
        step = queries_at_once(B, K, *p.y.shape, x.element_size(), device_of(x))
    else:
        step = whole_tiles(SCRATCH // scratch)
    with torch.cuda.device_of(x):
        if step >= B:
            return launch(p)
        outs = []
        for b in range(0, B, step):
            s = slice(b, b + step)
            part = p._replace(x=p.x[s], alpha=p.alpha[s], sigma=p.sigma[s])
            outs.append(launch(part._replace(v=None if p.v is None else p.v[s])))
    if isinstance(outs[0], Tensor):
        return torch.cat(outs)
    return tuple(torch.cat(o) for o in zip(*outs, strict=True))


class SplitMoments(NamedTuple):
    """The moments of every split and target."""

    scalars: (
        Tensor  # [4, splits, targets]: max_logit, weight_sum, weight_square_sum, projection_sum
    )
    vectors: Tensor  # [3, splits, targets, d]: reference, first_moment, second_moment
    splits: int
    prior_count: int  # N if no log_pi was added and every atom has prior 1/N, else 1


class _ProductPlan(NamedTuple):
    """How `product_moments_kernel` is launched."""

    sizes: dict[str, int]
    programs: int  # per split
    span: int
    splits: int


def _product_plan(N: int, d: int, targets: int, one_sum: bool, device: Device) -> _ProductPlan:
    sizes = product_sizes(targets, one_sum)
    programs = triton.cdiv(d, sizes["D"]) * triton.cdiv(targets, sizes["QUERIES"])
    splits = product_splits_for(N, programs, sizes["ATOMS"], device)
    return _ProductPlan(sizes, programs, *even_splits(N, splits, sizes["ATOMS"]))


def accumulate(
    p: Problem,
    logits: Logits | None = None,
    projections: Tensor | None = None,
    reference: Tensor | None = None,
    *,
    trace_only: bool = False,
) -> SplitMoments:
    """The moments of all splits.

    Args:
        p: the call.
        logits: for a tile whose logits are given; computed here if missing.
        projections, reference: <y - reference, v> [targets, N] and reference [targets, d], if the
            moments are those of the vectors v and the tile is given.
        trace_only: only the sum of the second moment over the coordinates will be used.
    """
    (B, d), N, targets = p.x.shape, p.y.shape[0], p.targets
    device = device_of(p.x)
    tile = tile_for(targets, d, p.x.element_size(), device)
    if tile.logits_given and logits is None:
        logits = compute_logits(p)
    programs = triton.cdiv(d, tile.D) * triton.cdiv(targets, tile.TARGETS)
    span, splits = even_splits(N, splits_for(N, programs, tile, device), tile.ATOMS)
    matvec = p.v is not None and (projections is not None or not tile.logits_given)
    products = None
    if tile.logits_given and logits.by_products is not None:
        products = _product_plan(N, d, targets, trace_only or matvec, device)
    count = splits + (0 if products is None else products.splits)
    scalars, vectors = p.x.new_empty(4, count, targets), p.x.new_empty(3, count, targets, d)
    floor = None if logits is None else logits.max_logit
    if products is not None:
        floor = torch.where(logits.by_products > 0, math.inf, floor)
    sweep_kernel[(programs * splits,)](
        **p.atom_arguments,
        x=p.x,
        v=p.v,
        alpha=p.alpha,
        sigma=p.sigma,
        logits=None if logits is None else logits.value,
        bounds=None,
        floor=floor,
        projections=projections,
        reference=reference,
        scalars=scalars,
        vectors=vectors,
        targets=targets,
        vectors_per_query=targets // B,
        splits=count,
        span=span,
        row_strips=1,
        gap=p.gap,
        MATVEC=matvec,
        GIVEN=tile.logits_given,
        D=tile.D,
        ATOMS=tile.ATOMS,
        TARGETS=tile.TARGETS,
        COORD_AXIS=tile.COORD_AXIS,
        STAGES=tile.STAGES,
        STRIP=tile.strip,
        num_warps=tile.warps,
    )
    moments = SplitMoments(scalars, vectors, count, N if p.log_pi is None else 1)
    if products is not None:
        _add_products(
            p, logits, projections, reference, moments, splits, products, matvec, trace_only
        )
    return moments


def _add_products(
    p: Problem,
    logits: Logits,
    projections: Tensor | None,
    reference: Tensor | None,
    moments: SplitMoments,
    begin_split: int,
    plan: _ProductPlan,
    matvec: bool,
    trace_only: bool,
) -> None:
    """Fills the splits of the queries that take products."""
    targets = p.targets
    product_moments_kernel[(plan.programs * plan.splits,)](
        **p.atom_arguments,
        logits=logits.value,
        max_logit=logits.max_logit,
        by_products=logits.by_products,
        centre=logits.centre,
        y_square=logits.y_square,
        projections=projections,
        reference=reference,
        scalars=moments.scalars,
        vectors=moments.vectors,
        targets=targets,
        vectors_per_query=targets // p.x.shape[0],
        splits=moments.splits,
        begin_split=begin_split,
        span=plan.span,
        one=1.0,
        MATVEC=matvec,
        TRACE_ONLY=trace_only,
        **plan.sizes,
        num_warps=8 if plan.sizes["QUERIES"] > 16 else 4,
    )


def merge_grid(targets: int, d: int, device: Device) -> tuple[tuple[int], dict[str, int]]:
    """(programs, sizes) of a merge: one program per target and block of coordinates.

    For few targets the blocks are narrow, down to the 32 bytes that memory moves at once, so that
    all multiprocessors have some; a program then takes as many more splits at a time.
    """
    widest = D = min(triton.next_power_of_2(d), 128)
    while D > 8 and targets * triton.cdiv(d, D) < 2 * device.multiprocessors:
        D //= 2
    return (targets * triton.cdiv(d, D),), {"SPLITS": 16 * widest // D, "D": D, "num_warps": 4}


def merged_mean(moments: SplitMoments, targets: int, d: int) -> Tensor:
    """The posterior mean, [targets, d] in double."""
    mean = moments.vectors.new_empty(targets, d, dtype=torch.float64)
    grid, sizes = merge_grid(targets, d, device_of(moments.scalars))
    merge_mean_kernel[grid](
        scalars=moments.scalars,
        vectors=moments.vectors,
        mean=mean,
        targets=targets,
        d=d,
        splits=moments.splits,
        **sizes,
    )
    return mean


def merged_weights(moments: SplitMoments) -> tuple[Tensor, Tensor]:
    """(log sum_i pi_i exp(-|u_i|^2/2), sum_i w_i^2), [targets] in double."""
    max_logit, weight_sum, weight_square_sum = moments.scalars[:3].double()
    largest = max_logit.amax(0)
    w = torch.exp2(max_logit - largest)
    total = (w * weight_sum).sum(0)
    log_sum = math.log(2) * largest + torch.log(total) - math.log(moments.prior_count)
    return log_sum, (w * w * weight_square_sum).sum(0) / (total * total)
