# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""First derivatives of a kind's sums on CUDA: the tiles of their kernels, and a call, prepared."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .device import Device
from .problem import Problem, stored_atoms


class PairTile(NamedTuple):
    """What one program of the weights, and of the sums over the atoms, handles at once."""

    D: int  # coordinates: a power of two
    ATOMS: int
    QUERIES: int
    COORD_AXIS: int
    warps: int
    whole: bool  # d fits: the sums are taken with the weights


def pair_tile(B: int, d: int, itemsize: int, tangent: bool, device: Device) -> PairTile:
    """The tile for B queries: a thread holds up to 32 numbers of it, 16 with a tangent of the atoms
    and 8 in float64, since it holds several such arrays."""
    D, held = triton.next_power_of_2(d), 8 if itemsize == 8 else 16 if tangent else 32
    if D * itemsize**2 <= 256 and B >= 64:  # a query per thread
        return PairTile(D, max(1, min(16, held // D)), 128, COORD_AXIS=0, warps=4, whole=True)
    queries = 1 if B == 1 else 16 // itemsize
    widest = min(512 // queries, 2048 // itemsize)
    block = min(D, widest)
    atoms = max(1, min(64, 128 * held // (queries * block)))
    return PairTile(block, atoms, queries, COORD_AXIS=2, warps=4, whole=widest >= D)


def sum_tile(targets: int, d: int, itemsize: int, squares: bool) -> dict[str, int]:
    """The tile of `pair_sums_kernel`, whose second sum halves it."""
    held = 128 // itemsize // (2 if squares else 1)
    D, queries = min(triton.next_power_of_2(d), 128), 1 if targets == 1 else 4
    atoms = max(1, min(64, 128 * held // (queries * D)))
    return {"D": D, "ATOMS": atoms, "TARGETS": queries, "STRIP": 512 // atoms}


def atoms_tile(d: int, itemsize: int) -> dict[str, int]:
    """The tile of `pair_atoms_kernel`."""
    D = min(triton.next_power_of_2(d), 128)
    return {"D": D, "ATOMS": min(256, 128 * 128 // itemsize // D), "STRIP": 16}


class Forms(NamedTuple):
    """f of every query, as pair_weights.py has it, and what the sums are taken about."""

    constant: Tensor  # [B]
    linear: Tensor | None  # [B, d]
    quadratic: Tensor | None  # [B] or [B, d]
    square: Tensor | None  # [B]


class Tangents(NamedTuple):
    """Tangents of what belongs to the atoms."""

    dy: Tensor | None = None  # [N, d]
    dlog_pi: Tensor | None = None  # [N]


NO_TANGENTS = Tangents()


class Pairs(NamedTuple):
    """Queries about their references; what only PyTorch reads is in double."""

    p: Problem  # its log_pi as given
    reference: Tensor  # [B, d]
    r: Tensor  # [B, d], double: (x - alpha reference)/sigma
    a: Tensor  # [B, 1], double: alpha/sigma
    level: Tensor  # [B]: rounded only after large logits have cancelled
    sigma: Tensor  # [B, 1], double

    def pull(self) -> Tensor:
        """a r, [B, d]."""
        return (self.a * self.r).to(self.reference.dtype)

    def curvature(self) -> Tensor:
        """a^2/2, [B]."""
        return (0.5 * self.a**2)[:, 0].to(self.reference.dtype)

    def some(self, b: slice) -> Pairs:
        """These queries."""
        p = self.p._replace(x=self.p.x[b], alpha=self.p.alpha[b], sigma=self.p.sigma[b])
        p = p._replace(v=None if p.v is None else p.v[b])
        return Pairs(p, *(t[b] for t in self[1:]))


def make_pairs(x, y, v, alpha, sigma, log_pi, scale, offset, shift, reference) -> Pairs:
    """The prepared form of a kernel's arguments."""
    y, scale, offset = stored_atoms(x, y, scale, offset)
    v = None if v is None else v.contiguous()
    log_pi = None if log_pi is None else log_pi.contiguous()
    p = Problem(x.contiguous(), y, v, alpha.contiguous(), sigma.contiguous(), log_pi, scale, offset)
    wide = sigma.double()[:, None]
    r = (x.double() - alpha.double()[:, None] * reference.double()) / wide
    level = shift.double() + 0.5 * r.square().sum(1)
    if log_pi is None:
        level = level + math.log(y.shape[0])
    reference = reference.contiguous()
    return Pairs(p, reference, r, alpha.double()[:, None] / wide, level.to(x.dtype), wide)


class ListedAtoms(NamedTuple):
    """The atoms of one query, and what takes that query's row of other tensors."""

    rows: Tensor
    y: Tensor
    log_pi: Tensor
    row: Callable[..., list[Tensor | None]]


def listed(y: Tensor, log_pi: Tensor | None, atoms: Tensor, counts: Tensor, dtype: torch.dtype):
    """The atoms of each query by lists (lists.py)."""
    for b, rows in enumerate(atoms.split(counts.tolist())):
        if log_pi is None:  # that of all atoms
            prior = y.new_full((len(rows),), -math.log(len(y)), dtype=dtype)
        else:
            prior = log_pi[rows]
        s = slice(b, b + 1)
        row = lambda *tensors, s=s: [None if t is None else t[s] for t in tensors]
        yield ListedAtoms(rows, y[rows], prior, row)
