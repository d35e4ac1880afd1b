"""Launches the sweep: which tile for which shape, and how the atoms are split."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton

from ._kinds import load
from ._triton import device_of
from ._triton_rows import rows_sum
from ._triton_sweep import sweep


class Tile(NamedTuple):
    D: int  # coordinates: a power of two, at least d unless the tile is wide
    ATOMS: int
    LANES: int
    DAX: int  # the axis of the coordinates
    STAGES: int
    warps: int
    wide: bool  # d is cut, logits are given


WIDEST = 4096  # coordinates of one program, float32


def tile_for(lanes: int, d: int, itemsize: int) -> Tile:
    """itemsize: of the compute dtype."""
    D = triton.next_power_of_2(d)
    if d <= 16 and lanes >= 64:
        return Tile(D, 16, 128, 0, 1, 4, False)
    if D * itemsize > 4 * WIDEST:
        return Tile(2048, 4, 1, 2, 1, 4, True)
    return Tile(D, max(1, min(8192 // D, 256)), 1, 2, 1, 4, False)


LONGEST = 128  # tiles of a split: chains of additions stay short
ROOM = 2**27  # numbers of scratch memory


def splits_for(N: int, blocks: int, tile: Tile, multiprocessors: int) -> int:
    """Enough programs for every multiprocessor, none with more than LONGEST tiles."""
    tiles = triton.cdiv(N, tile.ATOMS)
    fill = triton.cdiv(4 * multiprocessors, blocks)
    return max(triton.cdiv(tiles, LONGEST), min(fill, triton.cdiv(tiles, 4)))


def queries_at_once(B: int, K: int, N: int, d: int, itemsize: int, multiprocessors: int) -> int:
    """As many as ROOM allows."""
    tile = tile_for(B * K, d, itemsize)
    splits = splits_for(N, triton.cdiv(B * K, tile.LANES), tile, multiprocessors)
    return max(1, ROOM // (K * (3 * splits * d + 2 * N * tile.wide)))


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


def rows(p: Problem, about=None) -> torch.Tensor:
    """Every logit, or every <y - about, v>: [lanes, N]."""
    (N, d), lanes = p.y.shape, p.lanes
    out = p.x.new_empty(lanes, N)
    grid = (triton.cdiv(N, 16) * lanes,)
    x, v = p.x if about is None else about, p.x if p.v is None else p.v
    log_pi = p.x if p.log_pi is None else p.log_pi
    per_query = lanes // p.x.shape[0]
    rows_sum[grid](
        *(x, p.y, v, p.alpha, p.sigma, log_pi, out, N, d, p.y.stride(0), lanes, per_query),
        *(p.scale, p.offset),
        **p.flags,
        **{"PROJECT": about is not None, "D": 512, "ATOMS": 16, "LANES": 1, "STAGES": 2, "num_warps": 4},
    )
    return out


def gather(p: Problem, given=None, tilts=None, about=None) -> Sums:
    """The sweep of all splits; tilts and about make a wide one that of the vectors v."""
    (B, d), N, lanes = p.x.shape, p.y.shape[0], p.lanes
    tile = tile_for(lanes, d, p.x.element_size())
    if tile.wide and given is None:
        given = rows(p)
    parts = triton.cdiv(d, tile.D)
    blocks = triton.cdiv(lanes, tile.LANES)
    splits = splits_for(N, blocks * parts, tile, device_of(p.x).multiprocessors)
    span = triton.cdiv(triton.cdiv(N, splits), tile.ATOMS) * tile.ATOMS
    splits = triton.cdiv(N, span)
    scalars, vectors = p.x.new_empty(4, splits, lanes), p.x.new_empty(3, splits, lanes, d)
    gap = math.log2(N + 1) + (24 if p.x.dtype == torch.float32 else 53) + 14
    matvec = p.v is not None and (tilts is not None or not tile.wide)
    or_x = lambda t: p.x if t is None else t
    sweep[(parts * blocks * splits,)](
        *(p.x, p.y, or_x(p.v), p.alpha, p.sigma, or_x(p.log_pi), or_x(given), or_x(tilts), or_x(about)),
        *(scalars, vectors, N, d, p.y.stride(0), lanes, lanes // B, splits, span, gap, p.scale, p.offset),
        **p.flags,
        **{"MATVEC": matvec, "GIVEN": tile.wide, "D": tile.D, "ATOMS": tile.ATOMS, "LANES": tile.LANES},
        **{"DAX": tile.DAX, "STAGES": tile.STAGES, "num_warps": tile.warps},
    )
    return Sums(scalars, vectors, splits, 0.0 if p.log_pi is not None else -math.log(N))
