"""Potentials of an entropic transport problem, to a marginal error that is measured."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._torch import check
from ..._torch.objects import plain
from .._reporting import Callback, reporting
from ._iterate import State, iterate, start_of, warn
from ._points import Points, checked_points, checked_weights, placed
from ._problem import Problem
from .coupling import Coupling

__all__ = ["couple", "problem_of", "solve"]

_WIDE = 64  # times the costs: an eps from which float32 does not do


def solve(
    x: Tensor,
    y: Tensor,
    blur: float,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    tol: float = 1e-4,
    max_iter: int = 1000,
    start: Coupling | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Coupling:
    """Finds the entropic transport plan between two sets of points, by Sinkhorn's algorithm.

    Use it for pairs of a coupled flow (`Coupling.draw`), for a map between two sets
    (`Coupling.barycentric_map`), or to multiply by the plan. As a loss take `divergence`.

    The cost is |x - y|^2/2 and eps = blur^2; the package's page says how others count. Memory is
    that of some dozens of vectors of n and m numbers and of copies of the points. The half-steps
    are accelerated (Anderson), from potentials that a thinned problem has, or one at larger eps.

    Args:
        x: Points ``[n, *E]``, float32 or float64: the dtype of computation.
        y: Points ``[m, *E]``, in the same dtype, on the same device.
        blur: sqrt(eps) > 0, in the unit of the points: details below it are not resolved. The
            work grows as it falls.
        a: Weights of x, [n], floating, >= 0; their sum is taken out. None: uniform.
        b: Weights of y, [m].
        tol: The marginal error at which to stop, sum_j |sum_i P_ij - b_j|. In float32 it cannot
            fall below some 1e-7 times the cost of a pair over eps; float64 takes twice the time.
        max_iter: The largest number of iterations, of two passes over all pairs each.
        start: A coupling to start from: of points that have moved a little, of a part of them, of
            another blur, or one that has not converged.
        callback: Called as callback(done, max_iter) after each iteration.
        progress: Whether to show a bar on stderr.

    A run of hours is best done in parts, with a small max_iter and start= the last result, which
    `torch.save` takes.

    Returns:
        The `Coupling`, without a graph.

    Warns:
        NotConverged: The error is above tol, because of max_iter or of rounding; the message says
            at what it stopped, and what helps.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """
    check.positive("tol", tol)
    check.integer("max_iter", max_iter, 1)
    check.query("x", x)
    bar = reporting("sinkhorn", callback, progress, max_iter)
    with torch.no_grad(), plain(x.device), bar as report:
        return couple(problem_of(x, y, blur, a, b), start, tol, max_iter, report)


def couple(
    problem: Problem,
    start: Coupling | None,
    tol: float,
    max_iter: int,
    report: Callback = lambda done, total: None,
) -> Coupling:
    """`solve` of a problem; it warns where it does not converge."""
    g = start_of(problem) if start is None else _carried("start", start, problem)
    state: State = iterate(problem, g, tol, max_iter, report)
    warn(state, tol, problem.x.rows.dtype)
    return Coupling(
        problem,
        state.f,
        state.g,
        marginal_error=state.error,
        iterations=state.iterations,
        converged=not state.stopped,
    )


def problem_of(
    x: Tensor, y: Tensor, blur: float, a: Tensor | None = None, b: Tensor | None = None
) -> Problem:
    """The arguments of `solve`, checked, about their means; with x and y the same object and no b,
    the problem of a set with itself."""
    checked_points("x", x)
    given = check.positive("blur", blur)
    unit = 2.0 ** math.floor(math.log2(given))
    first = placed(x.detach(), checked_weights("a", a, "x", x), unit)
    if x is y and b is None:
        return _computed(first, first, given)
    checked_points("y", y)
    if y.shape[1:] != x.shape[1:]:
        want = f"shape {['m', *x.shape[1:]]} to go with x of shape {[*x.shape]}".replace("'", "")
        raise check.mismatch("y", want, [*y.shape])
    check.same("y", y, "x", x)
    return _computed(first, placed(y.detach(), checked_weights("b", b, "y", y), unit), given)


def _computed(x: Points, y: Points, blur: float) -> Problem:
    """The problem in the dtype of computation: that of the points, but float64 where eps is so much
    larger than the costs that these would drown in the rounding of the logits, of order 1.
    """
    eps = (blur / x.unit) ** 2
    cost = sum(float(p.weights @ p.rows.square().sum(1)) for p in (x, y)) / 2
    dtype = x.dtype if eps <= _WIDE * cost else torch.float64
    largest = sum(float(p.rows.norm(dim=1).amax()) for p in (x, y))
    limit = torch.finfo(dtype).max ** 0.5 / 4  # whose square has room for a sum
    if not largest <= limit:
        least = largest * x.unit / limit
        raise check.mismatch("blur", f"at least {least:.1e} for points so far apart", f"{blur:g}")
    sigma = torch.tensor(blur / x.unit, dtype=dtype, device="cpu").item()
    first = x._replace(rows=x.rows.to(dtype))
    return Problem(first, first if x is y else y._replace(rows=y.rows.to(dtype)), sigma)


def _carried(name: str, start: Coupling, problem: Problem) -> Tensor:
    """The potential g at other points y, from the potential f of a coupling, frame to frame: where
    a set has moved as a whole, its plan has not changed."""
    if not isinstance(start, Coupling):
        raise TypeError(f"{name}: expected a Coupling, got {type(start).__name__}")
    before = start._problem
    if before.y.shape != problem.y.shape:
        raise check.mismatch(name, f"points of shape {[*problem.y.shape]}", [*before.y.shape])
    if before.x.dtype != problem.x.dtype or before.x.mean.device != problem.x.mean.device:
        found = f"points of {before.x.dtype} on {before.x.mean.device}"
        want = f"points of {problem.x.dtype} on {problem.x.mean.device}"
        raise check.mismatch(name, want, found)
    ratio = problem.y.unit / before.y.unit
    rows = (problem.y.rows.double() * ratio).to(before.y.rows.dtype)
    return before.transposed.softmin(start._f, rows) / ratio**2
