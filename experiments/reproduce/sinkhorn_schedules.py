"""What others do in the place of a stop test, on two small sets with all their costs in float64: a
schedule of GeomLoss's kind, alternate half-steps, over-relaxed ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import nsgf_sets

f64 = torch.float64


def eight_gaussians(n: int, seed: int) -> Tensor:
    return nsgf_sets.eight_gaussians(n, torch.Generator().manual_seed(seed)).to(f64)


def normal(n: int, seed: int, d: int = 2) -> Tensor:
    return torch.randn(n, d, dtype=f64, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Dense:
    """Two sets of n points with equal weights, all their costs, and eps."""

    x: Tensor
    y: Tensor
    eps: float

    @property
    def costs(self) -> Tensor:
        return (self.x[:, None] - self.y[None]).square().sum(2) / 2

    def softmin(self, g: Tensor, costs: Tensor, eps: float | None = None) -> Tensor:
        eps = self.eps if eps is None else eps
        return -eps * (torch.logsumexp((g - costs) / eps, 1) - math.log(len(g)))

    def plan(self, f: Tensor, g: Tensor) -> Tensor:
        return torch.exp((f[:, None] + g - self.costs) / self.eps) / (len(f) * len(g))

    def column_error(self, f: Tensor, g: Tensor) -> float:
        return float((self.plan(f, g).sum(0) - 1 / len(g)).abs().sum())

    def dual(self, f: Tensor, g: Tensor) -> float:
        """<a, f> + <b, g>, which is the dual where the rows or the columns are right."""
        return float(f.mean() + g.mean())

    def primal(self, f: Tensor, g: Tensor) -> float:
        """<P, c> + eps KL(P | a b^T)."""
        plan = self.plan(f, g)
        relative = torch.xlogy(plan, plan * len(f) * len(g)) - plan
        return float((plan * self.costs).sum() + self.eps * (relative.sum() + 1))

    def map(self, g: Tensor) -> Tensor:
        return torch.softmax((g - self.costs) / self.eps, 1) @ self.y


def levels(diameter: float, blur: float, scaling: float) -> list[float]:
    """GeomLoss's values of eps: the diameter's, down by the factor scaling^2, and the blur's."""
    first, last, step = (2 * math.log(v) for v in (diameter, blur, scaling))
    count = math.ceil((last - first) / step)
    inner = [math.exp(first + k * step) for k in range(count)]
    return [diameter**2, *inner, blur**2]


def scheduled(problem: Dense, scaling: float) -> tuple[Tensor, Tensor, int]:
    """f, g and passes over all pairs: one symmetric update for each level, then one that is not
    averaged, as GeomLoss does."""
    both = torch.cat([problem.x, problem.y])
    diameter = float((both.amax(0) - both.amin(0)).norm())
    costs = problem.costs
    eps = levels(diameter, problem.eps**0.5, scaling)
    zero = torch.zeros(len(problem.x), dtype=f64)
    f, g = (problem.softmin(zero, c, eps[0]) for c in (costs, costs.T))
    for e in eps:
        new = problem.softmin(g, costs, e), problem.softmin(f, costs.T, e)
        f, g = (f + new[0]) / 2, (g + new[1]) / 2
    f, g = problem.softmin(g, costs), problem.softmin(f, costs.T)
    return f, g, 2 * (len(eps) + 2)


def scheduled_itself(x: Tensor, eps: float, scaling: float, like: Dense) -> Tensor:
    """The potential of a set with itself by the same rule, from the diameter of both sets."""
    own = Dense(x, x, eps)
    both = torch.cat([like.x, like.y])
    diameter = float((both.amax(0) - both.amin(0)).norm())
    costs, found = own.costs, torch.zeros(len(x), dtype=f64)
    steps = levels(diameter, eps**0.5, scaling)
    found = own.softmin(found, costs, steps[0])
    for e in steps:
        found = (found + own.softmin(found, costs, e)) / 2
    return own.softmin(found, costs)


def scheduled_divergence(problem: Dense, scaling: float) -> float:
    """<a, f - f_xx> + <b, g - g_yy>, the debiased value that such a schedule gives."""
    f, g, _ = scheduled(problem, scaling)
    own = (
        scheduled_itself(points, problem.eps, scaling, problem) for points in (problem.x, problem.y)
    )
    return float(sum((one - alone).mean() for one, alone in zip((f, g), own, strict=True)))


def alternated(problem: Dense, relaxation: float, most: int) -> Iterator[float]:
    """The marginal error after each iteration of g <- g + relaxation (S(S(g)) - g) from zero."""
    costs, g = problem.costs, torch.zeros(len(problem.y), dtype=f64)
    for _ in range(most):
        image = problem.softmin(problem.softmin(g, costs), costs.T)
        yield float(((g - image) / problem.eps).expm1().abs().mean())
        g = g + relaxation * (image - g)
