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
from .logits import Logits, compute_logits, few
from .merge import merge_mean_kernel
from .problem import Lists, Problem, make_problem
from .products import weighted_sums
from .sweep import sweep_kernel

MAX_TILES = 128  # tiles of a split: chains of additions stay short
SCRATCH = 2**29  # numbers of scratch memory, 2 GiB in float32


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

    @property
    def arguments(self) -> dict[str, int]:
        """What the sweep takes, by keyword."""
        sizes = {k: getattr(self, k) for k in ("D", "ATOMS", "TARGETS", "COORD_AXIS", "STAGES")}
        return {**sizes, "STRIP": self.strip, "num_warps": self.warps}


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
    """How many splits of N atoms the sweep has, for so many blocks of targets. Where logits are
    given, most tiles are passed over, and four times as many make a split."""
    most = MAX_TILES * (4 if tile.logits_given else 1)
    return _split_count(triton.cdiv(N, tile.ATOMS), blocks, device, most, tile.strip)


def spans(N: int, blocks: int, atoms: int, device: Device) -> tuple[int, int]:
    """(atoms of a split, number of splits), for tiles of so many atoms that are looked at one by
    one."""
    return even_splits(N, _split_count(triton.cdiv(N, atoms), blocks, device, MAX_TILES), atoms)


def _split_count(tiles: int, blocks: int, device: Device, most: int, strip: int = 1) -> int:
    """How many splits give every multiprocessor work, none of them with more tiles than `most`."""
    fill = triton.cdiv(4 * device.multiprocessors, blocks)
    return max(triton.cdiv(tiles, most), min(fill, triton.cdiv(tiles, 4 * strip)))


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


def tile_of(p: Problem) -> Tile:
    """The tile for a call. With lists a program has one target, as if there were no other."""
    targets = p.targets if p.lists is None else 1
    return tile_for(targets, p.x.shape[1], p.x.element_size(), device_of(p.x))


def queries_at_once(
    B: int,
    K: int,
    N: int,
    d: int,
    itemsize: int,
    matvec: bool,
    device: Device,
    listed: bool = False,
) -> int:
    """How many queries SCRATCH has room for, at least one: their moments, and where logits are
    given, these and the projections of the vectors. N: the atoms that a query counts, at most."""
    tile = tile_for(1 if listed else B * K, d, itemsize, device)
    splits = splits_for(N, triton.cdiv(B * K, tile.TARGETS), tile, device)
    pairs = N * (1 + K * matvec) * tile.logits_given
    return whole_tiles(SCRATCH // (3 * K * (splits + 1) * d + pairs))


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
    lists: Lists | None = None,
    anchor: bool = True,
):
    """Calls launch(problem) on as many queries at a time as the scratch memory allows.

    Of many queries whose moments are launched, those near the cloud come last: they are the ones
    that may take products, and a program of products has queries of one kind.

    Args:
        launch: takes a problem.
        x, y, v, alpha, sigma, log_prior, scale, offset: those of an op.
        normalised: log_prior is log pi already.
        scratch: numbers of scratch memory for each query, unless it is moments that are launched.
        lists: the atoms that each query counts; it is moments then.
        anchor: False: the problem's `queries` will not be used.
    """
    B, K = x.shape[0], 1 if v is None else v.shape[1]
    given = (x, y, v, alpha, sigma, log_prior, scale, offset)
    p = make_problem(*given, normalised=normalised, lists=lists, anchor=anchor)
    back = None
    if scratch is None or lists is not None:
        matvec, listed, d = v is not None, lists is not None, x.shape[1]
        step = queries_at_once(B, K, p.longest, d, x.element_size(), matvec, device_of(x), listed)
        if not few(B) and not listed:
            order = p.queries.near.to(torch.int32).sort(stable=True).indices
            p, back = p.rows(order), order.argsort()
    else:
        step = whole_tiles(SCRATCH // scratch)
    with torch.cuda.device_of(x):
        if step >= B:
            outs = launch(p)
        else:
            outs = [launch(p.rows(slice(b, b + step))) for b in range(0, B, step)]
            one = isinstance(outs[0], Tensor)
            outs = torch.cat(outs) if one else tuple(torch.cat(o) for o in zip(*outs, strict=True))
    if back is None:
        return outs
    return outs[back] if isinstance(outs, Tensor) else tuple(t[back] for t in outs)


class SplitMoments(NamedTuple):
    """The moments of every split and target."""

    scalars: (
        Tensor  # [4, splits, targets]: max_logit, weight_sum, weight_square_sum, projection_sum
    )
    vectors: Tensor  # [3, splits, targets, d]: reference, first_moment, second_moment
    splits: int
    prior_count: int  # N if no log_pi was added and every atom has prior 1/N, else 1
    common: Tensor  # [B], double: what the logits leave out, in natural logarithms


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
    device, tile = device_of(p.x), tile_of(p)
    if tile.logits_given and logits is None:
        logits = compute_logits(p)
    programs = triton.cdiv(d, tile.D) * triton.cdiv(targets, tile.TARGETS)
    splits = splits_for(p.longest, programs, tile, device)
    span, splits = even_splits(p.longest, splits, tile.ATOMS)
    matvec = p.v is not None and (projections is not None or not tile.logits_given)
    products = tile.logits_given and logits.by_products is not None
    count = splits + products
    scalars, vectors = p.x.new_empty(4, count, targets), p.x.new_empty(3, count, targets, d)
    floor = None if logits is None else logits.max_logit
    if products:
        floor = torch.where(logits.by_products > 0, math.inf, floor)
    sweep_kernel[(programs * splits,)](
        **p.atom_arguments,
        **p.list_arguments,
        anchor=p.queries.anchor,
        rest=p.queries.rest,
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
        **tile.arguments,
    )
    common = p.queries.common if logits is None else logits.common
    moments = SplitMoments(scalars, vectors, count, N if p.log_pi is None else 1, common)
    if products:
        _add_products(p, logits, projections, reference, moments, trace_only)
    return moments


def _add_products(
    p: Problem,
    logits: Logits,
    projections: Tensor | None,
    reference: Tensor | None,
    moments: SplitMoments,
    trace_only: bool,
) -> None:
    """Fills the last split with the moments of the queries that take products."""
    scalars, vectors, centre = moments.scalars[:, -1], moments.vectors[:, -1], p.queries.centre
    K = scalars.shape[1] // p.x.shape[0]
    sums = weighted_sums(p, logits, projections)
    chosen = torch.where(logits.by_products > 0, logits.max_logit, -math.inf)
    scalars[0], scalars[1], scalars[2] = (
        chosen.repeat_interleave(K),
        sums.weight,
        sums.weight_square,
    )
    if projections is not None:  # about the mean, where the first moment vanishes
        scalars[3], vectors[0], vectors[1] = sums.projection, reference, 0.0
        vectors[2] = sums.vector - sums.projection[:, None] * (reference - centre)
        return
    vectors[0], vectors[1] = centre, sums.vector
    if trace_only:
        vectors[2] = (sums.square_moment / p.x.shape[1])[:, None]
    else:
        vectors[2] = weighted_sums(p, logits, squared=True).vector


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
    log_sum += moments.common.repeat_interleave(len(log_sum) // len(moments.common))
    return log_sum, (w * w * weight_square_sum).sum(0) / (total * total)
