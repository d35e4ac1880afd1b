"""Weighted points as the solver takes them: checked, about their mean, in units of about the blur.

Everything has a leading axis of G problems; a single one has G = 1.

The mean is taken off each set by itself. With x = u x' + p and y = u y' + q,

    |x - y|^2/2 = u^2 |x' - y'|^2/2 + <x - p, p - q> - <y - q, p - q> + |p - q|^2/2

so that the plan between x' and y' is that between x and y, and only the potentials differ, by what
is linear. Logits then keep their digits however far from the origin, or from each other, the sets
lie. The unit u is a power of two, so that no digit is lost to it either.

With a reach both are taken about their common mean, p = q: only near pairs matter then, whose
differences are exact in any frame, and the mean of a set may be far from all that has a partner.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch import check, diagnosis

__all__ = ["Points", "checked_points", "checked_weights", "mean_of", "placed"]

_MANY = 2048  # points from which it pays to go over them along a curve
_PLAIN = 3  # the most coordinates in which neighbours on a curve are neighbours
_CELLS = 10  # bits of each coordinate's rank, for the curve


class Points(NamedTuple):
    """G sets of n points, each about a mean."""

    rows: Tensor  # x' [G, n, d], in the dtype of computation
    dtype: torch.dtype  # of x
    weights: Tensor  # [G, n], float64
    log_weights: Tensor  # [G, n], float64; -inf where there is no weight
    mean: Tensor  # p [G, d], float64
    unit: float  # u
    shape: torch.Size  # E
    order: Tensor | None  # [G, n]: in which a pass goes over them; None: as they stand

    @property
    def mass(self) -> Tensor:
        """The sum of the weights, [G]."""
        return self.weights.sum(1)

    def total(self, values: Tensor) -> Tensor:
        """sum_i a_i v_i, [G, n] -> [G]."""
        return torch.linalg.vecdot(self.weights, values)

    def into(self, x: Tensor) -> Tensor:
        """Points given as those were, in this frame: [G, B, *E] -> [G, B, d]."""
        flat = x.flatten(2) if x.dim() > 2 else x[:, :, None]
        return ((flat.double() - self.mean[:, None]) / self.unit).to(self.rows.dtype)

    def back(self, rows: Tensor) -> Tensor:
        """Points of this frame as the caller has them: [G, B, d] -> [G, B, *E]."""
        out = rows.double() * self.unit + self.mean[:, None]
        return out.to(self.dtype).reshape(*rows.shape[:2], *self.shape)

    def to(self, dtype: torch.dtype) -> Points:
        """The same with rows in the dtype of computation."""
        return self._replace(rows=self.rows.to(dtype))

    def of(self, problems: Tensor) -> Points:
        """Those of some of the problems."""
        order = None if self.order is None else self.order[problems]
        kept = (t[problems] for t in (self.rows, self.weights, self.log_weights, self.mean))
        rows, weights, log_weights, mean = kept
        return self._replace(
            rows=rows, weights=weights, log_weights=log_weights, mean=mean, order=order
        )

    def ordered(self, values: Tensor, k: int) -> Tensor:
        """values[k] [n, *K], of the points of problem k, in the order of a pass."""
        return values[k] if self.order is None else values[k][self.order[k]]

    def thinned(self, times: int) -> Points:
        """So many times fewer of the points, those with weight first, and all their mass; the same
        ones at every call."""
        n = self.weights.shape[1]
        generator = torch.Generator().manual_seed(0)
        drawn = torch.rand(n, generator=generator, dtype=torch.float64, device="cpu")
        last = (self.weights == 0).double()
        kept = (last + drawn.to(last.device)).argsort(1)[:, : max(1, n // times)]
        weights = self.weights.gather(1, kept)
        weights = weights * (self.mass / weights.sum(1))[:, None]
        rows = self.rows.gather(1, kept[..., None].expand(-1, -1, self.rows.shape[2]))
        return self._replace(rows=rows, weights=weights, log_weights=weights.log(), order=None)


def checked_points(name: str, x: Tensor, batched: bool) -> Tensor:
    """Points [n, *E], n >= 1, with finite values, as [1, n, *E]; batched [G, n, *E], G >= 1.

    Raises:
        TypeError, ValueError: They are not; the message names them.
    """
    check.query(name, x)
    if x.numel() == 0 or x.dim() < (2 if batched else 1):
        shape = "[G, n, *E] with G, n" if batched else "[n, *E] with n"
        raise check.mismatch(name, f"shape {shape} >= 1 and no empty dimension", [*x.shape])
    diagnosis.finite(name, x.detach())
    return x if batched else x[None]


def checked_weights(
    name: str, weights: Tensor | None, points_name: str, x: Tensor, batched: bool
) -> Tensor:
    """Weights [n] of points, batched [G, n], as [G, n] in float64; 1/n for None.

    Raises:
        TypeError, ValueError: They are no weights; the message names them.
    """
    if weights is None:
        n = x.shape[1]
        return torch.full(x.shape[:2], 1 / n, dtype=torch.float64, device=x.device)
    check.tensor(name, weights)
    if not weights.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating dtype, got {weights.dtype}")
    shape = x.shape[0 if batched else 1 : 2]
    if weights.shape != shape:
        raise check.mismatch(
            name, f"shape {[*shape]}, one weight per row of {points_name}", [*weights.shape]
        )
    if weights.device != x.device:
        raise check.mismatch(name, f"device {x.device} like {points_name}", weights.device)
    given = weights.detach()
    bad = ~(torch.isfinite(given) & (given >= 0))
    if bool(bad.any()):
        at = bad.nonzero()[0].tolist()
        raise check.mismatch(
            name, "finite weights >= 0", f"{given[tuple(at)].item()} at index {at}"
        )
    weights = given.double().reshape(x.shape[:2])
    total = weights.sum(1)
    if not bool((total > 0).all()):
        raise check.mismatch(name, "a positive sum", total[total <= 0][0].item())
    return weights


def mean_of(x: Tensor, weights: Tensor) -> Tensor:
    """The weighted means [G, d] of points [G, n, *E]; weights [G, n]."""
    part = weights / weights.sum(1, keepdim=True)
    return (part[:, None] @ x.reshape(*x.shape[:2], -1).double())[:, 0]


def placed(x: Tensor, weights: Tensor, mean: Tensor, unit: float) -> Points:
    """Points [G, n, *E] with weights [G, n] about means [G, d], in float64."""
    rows = (x.reshape(*x.shape[:2], -1).double() - mean[:, None]) / unit
    order = _curve(rows) if rows.shape[1] >= _MANY and rows.shape[2] <= _PLAIN else None
    return Points(rows, x.dtype, weights, weights.log(), mean, unit, x.shape[2:], order)


def _curve(rows: Tensor) -> Tensor:
    """An order of points [G, n, d] in which neighbours are near each other: Morton's curve through
    their ranks. A pass over atoms in this order can leave out most of what weighs nothing.
    """
    n, d = rows.shape[1:]
    ranks = (rows.argsort(1).argsort(1) << _CELLS) // n
    key = torch.zeros_like(ranks[..., 0])
    for bit in range(_CELLS):
        for k in range(d):
            key |= ((ranks[..., k] >> bit) & 1) << (bit * d + k)
    return key.argsort(dim=1, stable=True)
