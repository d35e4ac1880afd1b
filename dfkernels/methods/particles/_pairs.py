"""Rows of the matrix of a kernel among particles, where a factor that belongs to each pair stands
beside the kernel: as many at a time as keep the memory that of the particles.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Rows", "rows_of"]

_NUMBERS = 1 << 18  # of a matrix held at once, of which a functional has several


class Rows(NamedTuple):
    """Of the particles in `rows`, against all M: w_j exp(-|x_i - x_j|^2/h) and |x_i - x_j|^2."""

    rows: slice
    weighted_kernel: Tensor
    square: Tensor


def rows_of(x: Tensor, weights: Tensor, h: float) -> Iterator[Rows]:
    """All rows of particles x [M, d], in order; distances by differences."""
    step = max(1, _NUMBERS // len(x))
    for i in range(0, len(x), step):
        rows = slice(i, i + step)
        mode = "donot_use_mm_for_euclid_dist"
        square = torch.cdist(x[rows], x, compute_mode=mode).square_()
        yield Rows(rows, weights * torch.exp(square / -h), square)
