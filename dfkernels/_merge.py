"""How what passes over parts of a data set leave becomes one result.

Two parts of masses M_1 and M_2 (the words are those of partial.py) together have, with p_k =
M_k/(M_1 + M_2) and delta = mean_2 - mean_1 (Chan's formula),

    mean = p_1 mean_1 + p_2 mean_2                 Q = p_1^2 Q_1 + p_2^2 Q_2
    V    = p_1 V_1 + p_2 V_2 + p_1 p_2 |delta|^2
    C v  = p_1 C_1 v + p_2 C_2 v + p_1 p_2 delta <delta, v>        (and so diag C)

which is exact, associative, and has the part without atoms for its neutral element.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ._torch import check
from ._torch.objects import plain
from ._torch.shapes import column
from .certified.certificate import Certificate
from .partial import Partial

__all__ = ["merge"]


def merge(parts: Iterable[Partial]) -> Partial:
    """Puts parts of a data set together: exactly what one pass over all their atoms leaves, but for
    rounding in float64.

    Parts are added one after the other, and may come from a generator that makes them, so that
    never more than two are held. The result is a Partial again, to which others can be merged.
    Merged in the same order, the same parts give the same bits, whoever computed them and whether
    in one call or in several that go on from the first ones' result.

    Args:
        parts: Of disjoint sets of atoms, for the same x, alpha, sigma and v, at least one.

    Raises:
        TypeError: Something is no Partial.
        ValueError: There are none, or they are for other queries, or have other moments.
    """
    if isinstance(parts, Partial) or not isinstance(parts, Iterable):
        raise TypeError(
            f"parts: expected Partials, in a list or an iterator, got {type(parts).__name__}"
        )
    parts = iter(parts)
    first = next(parts, None)
    if first is None:
        raise ValueError("parts: expected at least one Partial, got none")
    total = _expect_partial(first)
    with plain(total.x.device):
        return functools.reduce(_of_two, parts, total)


def _expect_partial(part: object) -> Partial:
    if not isinstance(part, Partial):
        raise TypeError(f"parts: expected Partials, got {type(part).__name__}")
    return part


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a is b:
        return a is b
    same_kind = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return same_kind and torch.equal(a, b)


def _expect_alike(a: Partial, b: Partial) -> None:
    for name in ("x", "alpha", "sigma", "v"):
        if not _same(getattr(a, name), getattr(b, name)):
            raise ValueError(
                f"parts: expected the same {name} for all of them, got another: only parts for the "
                "same queries, on one device, can be merged"
            )
    for name in ("covariance_diagonal", "value_mean"):
        shapes = [None if (t := getattr(p, name)) is None else list(t.shape) for p in (a, b)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"parts: expected the same moments of all of them, got {name} of shape "
                f"{shapes[0]} and {shapes[1]}"
            )


def _of_two(a: Partial, b: Partial) -> Partial:
    """Both together, by the formulas above."""
    _expect_alike(a, _expect_partial(b))
    gap = b.log_mass - a.log_mass
    gap = torch.where(gap.isnan(), -math.inf, gap)  # neither has atoms
    p, q = torch.sigmoid(-gap), torch.sigmoid(gap)
    d = math.prod(a.x.shape[1:])
    delta = b.mean - a.mean
    flat = delta.reshape(-1, d)

    def average(first: Tensor, second: Tensor, between: Tensor | float = 0.0) -> Tensor:
        """p first + q second + p q between."""
        share, other = column(p, first), column(q, first)
        return share * first + other * second + share * other * between

    product = spread = value_mean = None
    if a.v is not None and a.covariance_product is not None and b.covariance_product is not None:
        rows = check.vectors("v", a.v, "x", a.x, d).double()
        along = (flat[:, None] * rows).sum(-1, keepdim=True)
        between = (flat[:, None] * along).reshape(a.v.shape)
        product = average(a.covariance_product, b.covariance_product, between)
    if a.covariance_diagonal is not None and b.covariance_diagonal is not None:
        spread = average(a.covariance_diagonal, b.covariance_diagonal, delta * delta)
    if a.value_mean is not None and b.value_mean is not None:
        value_mean = average(a.value_mean, b.value_mean)
    return replace(
        a,
        log_weight=torch.logaddexp(a.log_weight, b.log_weight),
        log_mass=torch.logaddexp(a.log_mass, b.log_mass),
        mean=average(a.mean, b.mean),
        variance=average(a.variance, b.variance, (flat * flat).sum(1)),
        weight_square=p**2 * a.weight_square + q**2 * b.weight_square,
        covariance_product=product,
        covariance_diagonal=spread,
        value_mean=value_mean,
        certificate=_of_both(a.certificate, b.certificate),
    )


def _of_both(a: Certificate | None, b: Certificate | None) -> Certificate | None:
    return (a or b) if a is None or b is None else a.with_other(b)
