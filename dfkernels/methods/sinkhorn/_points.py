"""Weighted points as the solver takes them: checked, about their mean, in units of about the blur.

The mean is taken off each set by itself. With x = u x' + p and y = u y' + q,

    |x - y|^2/2 = u^2 |x' - y'|^2/2 + <x - p, p - q> - <y - q, p - q> + |p - q|^2/2

so that the plan between x' and y' is that between x and y, and only the potentials differ, by what
is linear. Logits then keep their digits however far from the origin, or from each other, the sets
lie. The unit u is a power of two, so that no digit is lost to it either.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch import check, diagnosis

__all__ = ["Points", "checked_points", "checked_weights", "placed"]


class Points(NamedTuple):
    """n points about their weighted mean."""

    rows: Tensor  # x' [n, d], in the dtype of computation
    dtype: torch.dtype  # of x
    weights: Tensor  # [n], float64, their sum is 1
    log_weights: Tensor  # [n], float64; -inf where there is no weight
    mean: Tensor  # p [d], float64
    unit: float  # u
    shape: torch.Size  # E

    def into(self, x: Tensor) -> Tensor:
        """Points given as those were, in this frame: [B, *E] -> [B, d]."""
        return ((x.reshape(len(x), -1).double() - self.mean) / self.unit).to(self.rows.dtype)

    def back(self, rows: Tensor) -> Tensor:
        """Points of this frame as the caller has them: [B, d] -> [B, *E]."""
        out = rows.double() * self.unit + self.mean
        return out.to(self.dtype).reshape(len(rows), *self.shape)


def checked_points(name: str, x: Tensor) -> Tensor:
    """Points [n, *E], n >= 1, with finite values.

    Raises:
        TypeError, ValueError: They are not; the message names them.
    """
    flat = check.query(name, x)
    if flat.numel() == 0:
        raise check.mismatch(name, "shape [n, *E] with n >= 1 and no empty dimension", [*x.shape])
    diagnosis.finite(name, x.detach())
    return x


def checked_weights(name: str, weights: Tensor | None, points_name: str, x: Tensor) -> Tensor:
    """Weights [n] of points, normalised, in float64; uniform ones for None.

    Raises:
        TypeError, ValueError: They are no weights; the message names them.
    """
    n = len(x)
    if weights is None:
        return torch.full((n,), 1 / n, dtype=torch.float64, device=x.device)
    check.tensor(name, weights)
    if not weights.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating dtype, got {weights.dtype}")
    if weights.shape != (n,):
        raise check.mismatch(
            name, f"shape [{n}], one weight per row of {points_name}", [*weights.shape]
        )
    if weights.device != x.device:
        raise check.mismatch(name, f"device {x.device} like {points_name}", weights.device)
    given = weights.detach()
    bad = ~(torch.isfinite(given) & (given >= 0))
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise check.mismatch(name, "finite weights >= 0", f"{given[at].item()} at index [{at}]")
    total = weights.double().sum()
    if not bool(total > 0):
        raise check.mismatch(name, "a positive sum", total.item())
    return weights.double() / total


def placed(x: Tensor, weights: Tensor, unit: float) -> Points:
    """The frame of points [n, *E] with normalised weights, in float64."""
    rows = x.reshape(len(x), -1).double()
    mean = weights @ rows
    rows = (rows - mean) / unit
    return Points(rows, x.dtype, weights, weights.log(), mean, unit, x.shape[1:])
