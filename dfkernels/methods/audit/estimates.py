"""Means, ratios and shares with their standard errors."""

from __future__ import annotations

import math

from torch import Tensor

from .parts import Estimate

__all__ = ["mean", "ratio", "root", "share", "without_chance"]


def mean(values: Tensor, groups: int) -> Estimate:
    """The mean of values [Q]: `groups` independent groups of consecutive ones, such as those of one
    data point with several noises, which are not independent.
    """
    each = values.view(groups, -1).mean(1)
    return Estimate(each.mean().item(), each.std().item() / math.sqrt(groups))


def without_chance(values: Tensor, control: Tensor, groups: int) -> Tensor:
    """Values [Q] without what a control [Q], whose mean is 0 but for chance, explains of them by
    regression.
    """
    a, b = (each.view(groups, -1).mean(1) for each in (values, control))
    spread = b.var()
    slope = ((a - a.mean()) * (b - b.mean())).sum() / (groups - 1) / spread if spread > 0 else 0.0
    return values - slope * control


def ratio(a: Tensor, b: Tensor, groups: int) -> Estimate | None:
    """The ratio of two means over the same queries, each [Q]; its error to first order. None where
    the second mean is 0.
    """
    below = b.mean().item()
    if below == 0:
        return None
    value = a.mean().item() / below
    return Estimate(value, mean(a - value * b, groups).error / abs(below))


def share(chosen: Tensor) -> Estimate:
    """The share of true entries [n]. Its error is that of a share of (k + 1)/(n + 2), so that none
    of n, or all of them, is no certainty either.
    """
    n, k = len(chosen), int(chosen.sum())
    p = (k + 1) / (n + 2)
    return Estimate(k / n, math.sqrt(p * (1 - p) / (n + 3)))


def root(squared: Estimate | None) -> Estimate:
    """The square root of an estimate; 0 where there is none."""
    if squared is None or squared.value <= 0:
        return Estimate(0.0, 0.0)
    value = math.sqrt(squared.value)
    return Estimate(value, squared.error / (2 * value))
