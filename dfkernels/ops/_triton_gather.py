"""Launches the sweep: which tile for which shape, and how the atoms are split."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton

from ._kinds import load
from ._triton import device_of
from ._triton_sweep import sweep


class Tile(NamedTuple):
    D: int  # coordinates: a power of two, at least d
    ATOMS: int
    LANES: int
    DAX: int  # the axis of the coordinates
    STAGES: int
    warps: int


def tile_for(lanes: int, d: int, matvec: bool) -> Tile:
    D = triton.next_power_of_2(d)
    if d <= 16 and lanes >= 64:
        return Tile(D, 16, 128, 0, 1, 4)
    return Tile(D, max(1, min(8192 // D, 256)), 1, 2, 1, 4)


LONGEST = 128  # tiles of a split: chains of additions stay short


def splits_for(N: int, blocks: int, tile: Tile, multiprocessors: int) -> int:
    """Enough programs for every multiprocessor, none with more than LONGEST tiles."""
    tiles = triton.cdiv(N, tile.ATOMS)
    fill = triton.cdiv(4 * multiprocessors, blocks)
    return max(triton.cdiv(tiles, LONGEST), min(fill, triton.cdiv(tiles, 4)))


class Sums(NamedTuple):
    """What the sweep leaves: one entry per split and lane."""

    scalars: torch.Tensor  # [4, splits, lanes]
    vectors: torch.Tensor  # [3, splits, lanes, d]
    splits: int
    log_total: float


def gather(x, y, v, alpha, sigma, log_prior, scale, offset) -> Sums:
    """x [B, d], v [B, K, d] or None: one lane per query, or per vector."""
    (B, d), N = x.shape, y.shape[0]
    K = 1 if v is None else v.shape[1]
    if y.stride(1) != 1 or y.stride(0) >= 2**22:
        y = y.contiguous()
    if x.dtype == torch.float64 and (scale, offset) != (1.0, 0.0):
        y, scale, offset = load(y, x.dtype, scale, offset), 1.0, 0.0  # a kernel takes float32 numbers
    tile = tile_for(B * K, d, v is not None)
    blocks = triton.cdiv(B * K, tile.LANES)
    splits = splits_for(N, blocks, tile, device_of(x).multiprocessors)
    span = triton.cdiv(triton.cdiv(N, splits), tile.ATOMS) * tile.ATOMS
    splits = triton.cdiv(N, span)
    scalars, vectors = x.new_empty(4, splits, B * K), x.new_empty(3, splits, B * K, d)
    gap = math.log2(N + 1) + (24 if x.dtype == torch.float32 else 53) + 14
    log_pi = None if log_prior is None else torch.log_softmax(log_prior, 0)
    sweep[(blocks * splits,)](
        x.contiguous(),
        y,
        x if v is None else v.contiguous(),
        alpha.contiguous(),
        sigma.contiguous(),
        x if log_pi is None else log_pi,
        scalars,
        vectors,
        N,
        d,
        y.stride(0),
        B * K,
        K,
        splits,
        span,
        gap,
        scale,
        offset,
        MATVEC=v is not None,
        PRIOR=log_pi is not None,
        AFFINE=(scale, offset) != (1.0, 0.0),
        D=tile.D,
        ATOMS=tile.ATOMS,
        LANES=tile.LANES,
        DAX=tile.DAX,
        STAGES=tile.STAGES,
        num_warps=tile.warps,
    )
    return Sums(scalars, vectors, splits, 0.0 if log_prior is not None else -math.log(N))
