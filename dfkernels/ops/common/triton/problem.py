# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""The arguments of a data-set op, prepared for its Triton kernels."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..moments import load


class Problem(NamedTuple):
    """One call of a data-set op: contiguous tensors (except for the rows of y), log pi normalised.

    A target is a query, or a query with one of its vectors v.
    """

    x: Tensor  # [B, d]
    y: Tensor  # [N, d], rows y.stride(0) apart; the atoms are scale * y + offset
    v: Tensor | None  # [B, K, d]
    alpha: Tensor  # [B]
    sigma: Tensor  # [B]
    log_pi: Tensor | None  # [N], natural logarithms; None: uniform
    scale: float
    offset: float

    @property
    def targets(self) -> int:
        return self.x.shape[0] if self.v is None else self.v.shape[0] * self.v.shape[1]

    @property
    def gap(self) -> float:
        """An atom lighter than 2^-gap of the heaviest is negligible: all N together stay far below
        one rounding."""
        return math.log2(self.y.shape[0] + 1) + (24 if self.x.dtype == torch.float32 else 53) + 14

    @property
    def atom_arguments(self) -> dict[str, Any]:
        """What every kernel that reads atoms takes, by keyword."""
        return {
            "y": self.y,
            "log_pi": self.log_pi,
            "N": self.y.shape[0],
            "d": self.y.shape[1],
            "y_stride": self.y.stride(0),
            "scale": self.scale,
            "offset": self.offset,
            "PRIOR": self.log_pi is not None,
            "AFFINE": (self.scale, self.offset) != (1.0, 0.0),
        }


def stored_atoms(x: Tensor, y: Tensor, scale: float, offset: float) -> tuple[Tensor, float, float]:
    """y with rows that kernels can read, and scale and offset as they may be given to kernels."""
    if y.stride(1) != 1 or y.stride(0) >= 2**22:
        y = y.contiguous()
    if x.dtype == torch.float64 and (scale, offset) != (1.0, 0.0):
        # a kernel would receive scale and offset as float32
        y, scale, offset = load(y, x.dtype, scale, offset), 1.0, 0.0
    return y, scale, offset


def make_problem(
    x: Tensor,
    y: Tensor,
    v: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    log_prior: Tensor | None,
    scale: float,
    offset: float,
    *,
    normalised: bool = False,
) -> Problem:
    """The prepared form of an op's flat arguments; normalised: log_prior is log pi already."""
    y, scale, offset = stored_atoms(x, y, scale, offset)
    if log_prior is not None:
        log_prior = log_prior.contiguous() if normalised else torch.log_softmax(log_prior, 0)
    v = None if v is None else v.contiguous()
    return Problem(
        x.contiguous(), y, v, alpha.contiguous(), sigma.contiguous(), log_prior, scale, offset
    )
