"""Potentials to start from, which make the iteration short."""

from __future__ import annotations

from torch import Tensor

from ..._torch import check
from ._iterate import iterate
from ._problem import Problem

__all__ = ["carried", "start_of"]

_COARSE = 2048  # points of a set from which a thinned one is solved first
_THIN = 8  # how many times fewer it has
_COARSE_TOL = 1e-2  # a thinned set says no more about the whole one
_COARSE_ITER = 200
_ANNEAL = 0.25  # of eps, from level to level


def start_of(problem: Problem) -> Tensor:
    """Potentials g to start from: of thinned problems where the sets are large, else of problems
    whose eps falls from the size of the costs, one iteration each.
    """
    same = problem.x is problem.y
    if min(problem.x.rows.shape[1], problem.y.rows.shape[1]) >= _COARSE:
        x = problem.x.thinned(_THIN)
        y = x if same else problem.y.thinned(_THIN)
        small = problem._replace(x=x, y=y)
        state = iterate(small, start_of(small), _COARSE_TOL, _COARSE_ITER)
        return problem.damping * small.transposed.softmin(state.f, problem.y.rows)
    g = problem.y.weights.new_zeros(problem.y.weights.shape)
    spread = lambda p: p.total(p.rows.double().square().sum(2)) / p.mass
    eps = float((spread(problem.x) + spread(problem.y)).amax()) / 2
    while eps > problem.eps:
        level = problem._replace(sigma=eps**0.5)
        g = level.transposed.half_step(level.half_step(g))
        eps *= _ANNEAL
    return g


def carried(name: str, before: Problem, f: Tensor, problem: Problem) -> Tensor:
    """Potentials g at other points y, from the potentials f of an earlier problem. Where marginals
    are kept, from frame to frame: a set that has moved as a whole has the plan that it had.

    Raises:
        ValueError: The earlier problem does not go with this one; the message calls it `name`.
    """
    if before.y.shape != problem.y.shape:
        raise check.mismatch(name, f"points of shape {[*problem.y.shape]}", [*before.y.shape])
    if len(before.y.rows) != len(problem.y.rows):
        count = lambda p: f"{len(p.y.rows)} problem{'s' * (len(p.y.rows) != 1)}"
        raise check.mismatch(name, count(problem), count(before))
    if before.x.dtype != problem.x.dtype or before.x.mean.device != problem.x.mean.device:
        found = f"points of {before.x.dtype} on {before.x.mean.device}"
        want = f"points of {problem.x.dtype} on {problem.x.mean.device}"
        raise check.mismatch(name, want, found)
    ratio = problem.y.unit / before.y.unit
    rows, there, here = problem.y.rows.double() * ratio, before.transposed, problem.transposed
    moved = before.rho is None and problem.rho is None
    if not moved:
        rows = rows + (problem.y.mean - before.y.mean)[:, None] / before.y.unit
    rows = rows.to(before.y.rows.dtype)
    g = there.softmin(f, rows)
    if not moved:
        g = g + there.level(rows) - here.level() * ratio**2
    return problem.damping * g / ratio**2
