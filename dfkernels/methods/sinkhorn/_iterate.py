"""Sinkhorn's iteration with a stop test, and the start that makes it short."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._anderson import Anderson
from ._points import Points
from ._problem import Problem
from .not_converged import NotConverged

__all__ = ["State", "iterate", "start_of", "warn"]

_COARSE = 2048  # points of a set from which a thinned one is solved first
_THIN = 8  # how many times fewer it has
_COARSE_TOL = 1e-2  # a thinned set says no more about the whole one
_COARSE_ITER = 200
_ANNEAL = 0.25  # of eps, from level to level
_SHORTEN = 4.0  # a proposal that does not raise the dual, how much
_PATIENCE = 30  # iterations without progress, near the rounding, after which there will be none


class State(NamedTuple):
    """Potentials f = S(g) and g, how far they are from a solution, and what it took."""

    f: Tensor
    g: Tensor
    error: float  # |P^T 1 - b|_1
    iterations: int
    stopped: str  # "" where the error is at most tol, else "rounding" or "iterations"


def iterate(
    problem: Problem,
    g: Tensor,
    tol: float,
    max_iter: int,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> State:
    """Iterates from g until the marginal error is at most tol, at least once.

    The plain iteration is g <- S(S(g)), two half-steps, or for a set with itself, where it
    converges by itself in a few dozen, the mean g <- (g + S(g))/2. The error of g is known from the
    same half-steps, so that the test costs nothing, and the best g found is what is returned.

    A proposal of Anderson's is taken where the dual rises by as much as the plain step is sure to
    raise it, at least, else one nearer to the plain step: so that the iteration converges from
    anywhere, as Sinkhorn's does.
    """
    mixer, same = Anderson(problem.y.weights), problem.x is problem.y
    f, length, best, since = problem.softmin(g), 1.0, None, 0
    for k in range(1, max_iter + 1):
        image = f if same else problem.transposed.softmin(f)
        error, rounding = problem.marginal_error(g, image), problem.rounding(image)
        since += 1
        if best is None or error < best.error:
            best, since = State(f, g, error, k, ""), 0
        report(k, max_iter)
        if error <= tol:
            return best
        if since >= _PATIENCE and best.error <= 16 * rounding:
            return best._replace(stopped="rounding")
        least = problem.dual(f, g) - problem.eps * rounding
        least += 0 if same else problem.sure_gain(g, image)
        plain = (g + image) / 2 if same else image
        proposal = mixer.next(g, plain)
        length = min(1.0, _SHORTEN * length)
        while True:
            g = plain + length * (proposal - plain)
            f = problem.softmin(g)
            if length == 0 or problem.dual(f, g) >= least:
                break
            length = length / _SHORTEN if length > _SHORTEN**-3 else 0.0
        if length == 0:
            mixer.forget()
            length = _SHORTEN**-2
    assert best is not None
    return best._replace(iterations=max_iter, stopped="iterations")


def start_of(problem: Problem) -> Tensor:
    """Potentials g to start from: of a thinned problem where the sets are large, else of problems
    whose eps falls from the size of the costs, one iteration each.
    """
    same = problem.x is problem.y
    if min(len(problem.x.rows), len(problem.y.rows)) >= _COARSE:
        x = _thinned(problem.x)
        small = Problem(x, x if same else _thinned(problem.y), problem.sigma)
        state = iterate(small, start_of(small), _COARSE_TOL, _COARSE_ITER)
        return small.transposed.softmin(state.f, problem.y.rows)
    g = torch.zeros_like(problem.y.weights)
    eps = (
        sum(float(p.weights @ p.rows.double().square().sum(1)) for p in (problem.x, problem.y)) / 2
    )
    while eps > problem.eps:
        level = problem._replace(sigma=eps**0.5)
        g = level.transposed.softmin(level.softmin(g))
        eps *= _ANNEAL
    return g


def _thinned(points: Points) -> Points:
    """Some of the points that have weight, the same ones at every call."""
    given = points.weights.nonzero()[:, 0]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(given), generator=generator, dtype=torch.int64, device="cpu")
    kept = given[order[: max(1, len(given) // _THIN)].to(given.device)]
    weights = points.weights[kept]
    weights = weights / weights.sum()
    return points._replace(rows=points.rows[kept], weights=weights, log_weights=weights.log())


def warn(state: State, tol: float, dtype: torch.dtype) -> None:
    """Warns of a state that did not converge, and says what helps."""
    if not state.stopped:
        return
    why = f"after {state.iterations} iterations; raise max_iter, blur or tol"
    if state.stopped == "rounding":
        kind = str(dtype).removeprefix("torch.")
        more = "give x and y in float64, or " if dtype == torch.float32 else ""
        why = f"where rounding in {kind} hides the rest; {more}raise blur or tol"
    warnings.warn(
        f"sinkhorn: stopped at a marginal error of {state.error:.1e}, tol = {tol:.1e}, {why}",
        NotConverged,
        stacklevel=4,  # of who called solve or divergence,
    )
