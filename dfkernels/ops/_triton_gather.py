"""Launches the sweep: which tile for which shape, and how the atoms are split."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton

from ._kinds import load
from ._triton import device_of
from ._triton_rows import filter_logits, rows_sum
from ._triton_sweep import sweep


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


WIDEST = 4096  # float32 coordinates that a program of the sweep holds
LONGEST = 128  # tiles of a split: chains of additions stay short
ROOM = 2**28  # numbers of scratch memory


def tile_for(lanes: int, d: int, itemsize: int) -> Tile:
    """itemsize: of the compute dtype. A thread holds 32 words of a tile, and its share of four vectors."""
    D = triton.next_power_of_2(d)
    if d <= 16 and lanes >= 64:
        return Tile(D, max(2, min(16, 32 // D)), 128, 0, 1, 4, False)
    few = itemsize == 4 and 1 < lanes <= 16
    if few and d > 16:
        return Tile(128, 16, 4, 2, 1, 4, True, 64)
    if D * itemsize > 4 * WIDEST or itemsize == 4 and lanes > 16 and d > 16:
        D = min(D, 4096 // itemsize)
        return Tile(D, 32768 // itemsize // D, 1, 2, 1, 8, True, 1024 * D * itemsize // 32768)
    warps = 16 if D * itemsize >= 16384 else 8 if D * itemsize >= 4096 else 4
    atoms = min(256, 4096 * warps // (itemsize * D))
    return Tile(D, atoms, 1, 2, 3 if D >= 512 else 1, warps, False)


def splits_for(N: int, blocks: int, tile: Tile, multiprocessors: int) -> int:
    """Enough programs for every multiprocessor, none with more than LONGEST tiles."""
    tiles = triton.cdiv(N, tile.ATOMS)
    fill = triton.cdiv(4 * multiprocessors, blocks)
    return max(triton.cdiv(tiles, LONGEST), min(fill, triton.cdiv(tiles, 4 * tile.strip)))


def queries_at_once(B: int, K: int, N: int, d: int, itemsize: int, multiprocessors: int) -> int:
    """As many as ROOM allows."""
    tile = tile_for(B * K, d, itemsize)
    splits = splits_for(N, triton.cdiv(B * K, tile.LANES), tile, multiprocessors)
    return max(1, ROOM // (K * (3 * splits * d + 2 * N * tile.given)))


def in_blocks(launch, x, y, v, alpha, sigma, log_prior, scale, offset):
    """launch(problem) for some queries at a time; outputs are per query."""
    B, K = x.shape[0], 1 if v is None else v.shape[1]
    p = problem(x, y, v, alpha, sigma, log_prior, scale, offset)
    step = queries_at_once(B, K, *p.y.shape, x.element_size(), device_of(x).multiprocessors)
    with torch.cuda.device_of(x):
        if B <= step:
            return launch(p)
        some = [slice(b, b + step) for b in range(0, B, step)]
        outs = [
            launch(
                p._replace(x=p.x[s], alpha=p.alpha[s], sigma=p.sigma[s], v=None if v is None else p.v[s])
            )
            for s in some
        ]
    if isinstance(outs[0], torch.Tensor):
        return torch.cat(outs)
    return tuple(torch.cat(o) for o in zip(*outs, strict=True))


class Problem(NamedTuple):
    """Arguments as kernels take them: contiguous but for y's rows, log pi normalised."""

    x: torch.Tensor
    y: torch.Tensor
    v: torch.Tensor | None
    alpha: torch.Tensor
    sigma: torch.Tensor
    log_pi: torch.Tensor | None
    scale: float
    offset: float

    @property
    def lanes(self):
        return self.x.shape[0] if self.v is None else self.v.shape[0] * self.v.shape[1]

    @property
    def flags(self):
        affine = (self.scale, self.offset) != (1.0, 0.0)
        return {"PRIOR": self.log_pi is not None, "AFFINE": affine}


def problem(x, y, v, alpha, sigma, log_prior, scale, offset) -> Problem:
    if y.stride(1) != 1 or y.stride(0) >= 2**22:
        y = y.contiguous()
    if x.dtype == torch.float64 and (scale, offset) != (1.0, 0.0):
        y, scale, offset = load(y, x.dtype, scale, offset), 1.0, 0.0  # a kernel takes float32 numbers
    log_pi = None if log_prior is None else torch.log_softmax(log_prior, 0)
    v = None if v is None else v.contiguous()
    return Problem(x.contiguous(), y, v, alpha.contiguous(), sigma.contiguous(), log_pi, scale, offset)


class Sums(NamedTuple):
    """What the sweep leaves: one entry per split and lane, a query or one of its vectors."""

    scalars: torch.Tensor  # [4, splits, lanes]
    vectors: torch.Tensor  # [3, splits, lanes, d]
    splits: int
    log_total: float


def rows(p: Problem, about=None, given=None, floor=None, gap=0.0) -> torch.Tensor:
    """Every <y - about, v>, [lanes, N]; every logit, [B, N]; or those of `given` that may matter, in place."""
    N, d = p.y.shape
    lanes = p.x.shape[0] if about is None else p.lanes
    out = p.x.new_empty(lanes, N) if given is None else given
    block = 4 if lanes > 1 else 1
    grid = (triton.cdiv(N, 256) * triton.cdiv(lanes, block),)
    or_x = lambda t: p.x if t is None else t
    rows_sum[grid](
        *(or_x(about), p.y, or_x(p.v), p.alpha, p.sigma, or_x(p.log_pi), or_x(floor), out),
        *(N, d, p.y.stride(0), lanes, lanes // p.x.shape[0], gap, p.scale, p.offset),
        **p.flags,
        **{"PROJECT": about is not None, "FILTERED": given is not None},
        **{"D": 128 if block == 4 else 512, "ATOMS": 16, "LANES": block, "STRIP": 16, "num_warps": 4},
    )
    return out


def filtered(p: Problem, gap: float):
    """(logits [B, N], floor [B]): by a matrix product what each is at most; anew what may matter."""
    (B, d), N = p.x.shape, p.y.shape[0]
    centre = load(p.y[:: max(1, N // 64)][:64], p.x.dtype, p.scale, p.offset).mean(0)
    x = p.x - p.alpha[:, None] * centre
    queries = max(16, min(128, triton.next_power_of_2(B)))
    tiles = triton.cdiv(N, 128)
    upper, lower = x.new_empty(B, N), x.new_empty(B, tiles)
    filter_logits[(tiles * triton.cdiv(B, queries),)](
        *(x.to(torch.bfloat16 if x.is_cuda else x.dtype), p.y, centre, x.square().sum(1)),
        *(p.alpha, p.sigma, p.x if p.log_pi is None else p.log_pi, upper, lower),
        *(N, d, p.y.stride(0), B, p.scale, p.offset),
        **p.flags,
        **{"D": 64, "ATOMS": 128, "QUERIES": queries, "STAGES": 3, "num_warps": 8 if queries > 64 else 4},
    )
    floor = lower.amax(1)
    return rows(p, given=upper, floor=floor, gap=gap), floor


def logits(p: Problem):
    """(logits [B, N], floor [B]), exact where they matter."""
    if p.x.dtype == torch.float32 and p.x.shape[0] > 1:
        return filtered(p, gap_of(p))
    given = rows(p)
    return given, given.amax(1)


def gap_of(p: Problem) -> float:
    """Atoms lighter than 2^-gap of the heaviest do not count: all N of them together are far below an eps."""
    return math.log2(p.y.shape[0] + 1) + (24 if p.x.dtype == torch.float32 else 53) + 14


def gather(p: Problem, given=None, tilts=None, about=None) -> Sums:
    """The sweep of all splits. given: what `logits` returns, for tiles that take it; with tilts and about the
    sums are those of the vectors v.
    """
    (B, d), N, lanes = p.x.shape, p.y.shape[0], p.lanes
    tile = tile_for(lanes, d, p.x.element_size())
    if tile.given and given is None:
        given = logits(p)
    given, floor = given or (p.x, p.x)
    parts = triton.cdiv(d, tile.D)
    blocks = triton.cdiv(lanes, tile.LANES)
    splits = splits_for(N, blocks * parts, tile, device_of(p.x).multiprocessors)
    span = triton.cdiv(triton.cdiv(N, splits), tile.ATOMS) * tile.ATOMS
    splits = triton.cdiv(N, span)
    scalars, vectors = p.x.new_empty(4, splits, lanes), p.x.new_empty(3, splits, lanes, d)
    matvec = p.v is not None and (tilts is not None or not tile.given)
    or_x = lambda t: p.x if t is None else t
    sweep[(parts * blocks * splits,)](
        *(p.x, p.y, or_x(p.v), p.alpha, p.sigma, or_x(p.log_pi), given, floor, or_x(tilts), or_x(about)),
        *(scalars, vectors, N, d, p.y.stride(0), lanes, lanes // B, splits, span, gap_of(p)),
        *(p.scale, p.offset),
        **p.flags,
        **{"MATVEC": matvec, "GIVEN": tile.given, "D": tile.D, "ATOMS": tile.ATOMS, "LANES": tile.LANES},
        **{"DAX": tile.DAX, "STAGES": tile.STAGES, "STRIP": tile.strip, "num_warps": tile.warps},
    )
    return Sums(scalars, vectors, splits, 0.0 if p.log_pi is not None else -math.log(N))
