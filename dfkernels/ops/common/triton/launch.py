"""Launches the sweep: which tile for which shape, and how the atoms are split."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton

from .device import Device, device_of
from .logits import Logits, logits
from .problem import Problem, gap_of, problem
from .products import near_sums
from .sweep import sweep


class Tile(NamedTuple):
    """One program of the sweep. GIVEN: logits come from another launch, and d may be cut."""

    D: int  # coordinates: a power of two
    ATOMS: int
    LANES: int
    DAX: int  # the axis of the coordinates
    STAGES: int
    warps: int
    given: bool
    strip: int = 1


LONGEST = 128  # tiles of a split: chains of additions stay short
ROOM = 2**28  # numbers of scratch memory


def tile_for(lanes: int, d: int, itemsize: int, device: Device) -> Tile:
    """itemsize: of the compute dtype. A thread holds 32 words of a tile (float64: half as many
    numbers again) and its share of four vectors; that sets the warps, and what d can be without
    logits given.
    """
    D = triton.next_power_of_2(d)
    if D * itemsize**2 <= 256 and lanes >= 64:
        return Tile(D, max(2, min(16, 32 // D)), 128, 0, 1, 4, False)
    if itemsize == 4 and 1 < lanes <= 16 and d > 16:
        return Tile(128, 8, 4, 2, 1, 4, True, 128)
    if D * itemsize**2 > 2**16 or (itemsize == 4 and lanes > 16 and d > 16):
        D = min(D, 4096 // itemsize)
        atoms = min(16, 32768 // itemsize // D)
        return Tile(D, atoms, 1, 2, 1, 8 if D >= 512 else 4, True, 1024 // atoms)
    warps = 16 if D * itemsize >= 16384 else 8 if D * itemsize >= 4096 else 4
    atoms = min(256, 16384 * warps // (itemsize**2 * D))
    if warps == 16 and device.cc // 10 == 10:
        atoms //= 2  # Triton 3.7 would spill in the loop
    stages = min(3, 1 + (device.shared - 2**15) // (atoms * D * itemsize)) if D >= 512 else 1
    return Tile(D, atoms, 1, 2, stages, warps, False)


def splits_for(N: int, blocks: int, tile: Tile, device: Device) -> int:
    """Enough programs for every multiprocessor, none with more than LONGEST tiles."""
    tiles = triton.cdiv(N, tile.ATOMS)
    fill = triton.cdiv(4 * device.multiprocessors, blocks)
    return max(triton.cdiv(tiles, LONGEST), min(fill, triton.cdiv(tiles, 4 * tile.strip)))


def products_sizes(lanes: int, one: bool) -> dict[str, int]:
    """A program of `near_sums`: two sums of 64 x 32 numbers, or one of 64 x 64, do not spill."""
    queries = max(16, min(64, triton.next_power_of_2(lanes)))
    return {"D": 64 if one else 32, "ATOMS": 32, "QUERIES": queries, "STAGES": 3}


def splits_of_products(N: int, programs: int, atoms: int, device: Device) -> int:
    """As `splits_for`; what is added up within a tile counts as one addition."""
    return max(
        triton.cdiv(2 * device.multiprocessors, programs), triton.cdiv(N, 8 * LONGEST * atoms)
    )


def queries_at_once(B: int, K: int, N: int, d: int, itemsize: int, device: Device) -> int:
    """As many as ROOM allows."""
    tile = tile_for(B * K, d, itemsize, device)
    splits = splits_for(N, triton.cdiv(B * K, tile.LANES), tile, device)
    step = max(1, ROOM // (K * (3 * splits * d + 2 * N * tile.given)))
    return step if step < 128 else step // 128 * 128  # whole tiles of the filter


def in_blocks(launch, x, y, v, alpha, sigma, log_prior, scale, offset):
    """launch(problem) for some queries at a time; outputs are per query."""
    B, K = x.shape[0], 1 if v is None else v.shape[1]
    p = problem(x, y, v, alpha, sigma, log_prior, scale, offset)
    step = queries_at_once(B, K, *p.y.shape, x.element_size(), device_of(x))
    with torch.cuda.device_of(x):
        if step >= B:
            return launch(p)
        some = [slice(b, b + step) for b in range(0, B, step)]
        outs = [
            launch(
                p._replace(
                    x=p.x[s], alpha=p.alpha[s], sigma=p.sigma[s], v=None if v is None else p.v[s]
                )
            )
            for s in some
        ]
    if isinstance(outs[0], torch.Tensor):
        return torch.cat(outs)
    return tuple(torch.cat(o) for o in zip(*outs, strict=True))


class Sums(NamedTuple):
    """What the sweep leaves: one entry per split and lane, a query or one of its vectors."""

    scalars: torch.Tensor  # [4, splits, lanes]
    vectors: torch.Tensor  # [3, splits, lanes, d]
    splits: int
    atoms: int  # N where no log_pi was added, and every atom weighs 1/N; else 1


def gather(
    p: Problem, found: Logits | None = None, tilts=None, about=None, *, spread=False
) -> Sums:
    """The sums of all splits. found: logits, where a tile takes them; with tilts and about the sums
    are those of the vectors v. spread: only the sum of second over the coordinates will be used.
    """
    (B, d), N, lanes = p.x.shape, p.y.shape[0], p.lanes
    device = device_of(p.x)
    tile = tile_for(lanes, d, p.x.element_size(), device)
    if tile.given and found is None:
        found = logits(p)
    parts = triton.cdiv(d, tile.D)
    blocks = triton.cdiv(lanes, tile.LANES)
    splits = splits_for(N, blocks * parts, tile, device)
    span = triton.cdiv(triton.cdiv(N, splits), tile.ATOMS) * tile.ATOMS
    splits = triton.cdiv(N, span)
    matvec = p.v is not None and (tilts is not None or not tile.given)
    products = found is not None and found.near is not None and tile.given
    near_splits = 0
    if products:
        sizes = products_sizes(lanes, spread or matvec)
        programs = triton.cdiv(d, sizes["D"]) * triton.cdiv(lanes, sizes["QUERIES"])
        near_splits = splits_of_products(N, programs, sizes["ATOMS"], device)
        near_span = triton.cdiv(triton.cdiv(N, near_splits), sizes["ATOMS"]) * sizes["ATOMS"]
        near_splits = triton.cdiv(N, near_span)
    count = splits + near_splits
    scalars, vectors = p.x.new_empty(4, count, lanes), p.x.new_empty(3, count, lanes, d)
    or_x = lambda t: p.x if t is None else t
    given, floor = (p.x, p.x) if found is None else found[:2]
    if products:
        floor = torch.where(found.near > 0, math.inf, floor)
    sweep[(parts * blocks * splits,)](
        *(
            p.x,
            p.y,
            or_x(p.v),
            p.alpha,
            p.sigma,
            or_x(p.log_pi),
            given,
            floor,
            or_x(tilts),
            or_x(about),
        ),
        *(scalars, vectors, N, d, p.y.stride(0), lanes, lanes // B, count, span, gap_of(p)),
        *(p.scale, p.offset),
        **p.flags,
        MATVEC=matvec,
        GIVEN=tile.given,
        D=tile.D,
        ATOMS=tile.ATOMS,
        LANES=tile.LANES,
        DAX=tile.DAX,
        STAGES=tile.STAGES,
        STRIP=tile.strip,
        num_warps=tile.warps,
    )
    if products:
        near_sums[(programs * near_splits,)](
            *(found.given, found.top, found.near, p.y, or_x(p.log_pi), found.centre, found.sizes),
            *(or_x(tilts), or_x(about), scalars, vectors),
            *(
                N,
                d,
                p.y.stride(0),
                lanes,
                lanes // B,
                count,
                splits,
                near_span,
                1.0,
                p.scale,
                p.offset,
            ),
            **sizes,
            **p.flags,
            MATVEC=matvec,
            SPREAD=spread,
            num_warps=8 if sizes["QUERIES"] > 16 else 4,
        )
    return Sums(scalars, vectors, count, N if p.log_pi is None else 1)


def merge_grid(lanes: int, d: int):
    """(programs, sizes) of a merge: one program per lane and block of coordinates."""
    D = min(triton.next_power_of_2(d), 128)
    return (lanes * triton.cdiv(d, D),), {"SPLITS": 16, "D": D, "num_warps": 4}
