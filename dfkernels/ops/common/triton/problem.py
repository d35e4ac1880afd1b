"""A call of a data-set op as its kernels take it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..moments import load


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
        y, scale, offset = (
            load(y, x.dtype, scale, offset),
            1.0,
            0.0,
        )  # a kernel takes float32 numbers
    log_pi = None if log_prior is None else torch.log_softmax(log_prior, 0)
    v = None if v is None else v.contiguous()
    return Problem(
        x.contiguous(), y, v, alpha.contiguous(), sigma.contiguous(), log_pi, scale, offset
    )


def gap_of(p: Problem) -> float:
    """Atoms lighter than 2^-gap of the heaviest do not count: all N of them together are far below
    an eps."""
    return math.log2(p.y.shape[0] + 1) + (24 if p.x.dtype == torch.float32 else 53) + 14
