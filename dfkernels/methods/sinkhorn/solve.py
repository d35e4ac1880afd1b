"""Potentials of entropic transport problems, to a marginal error that is measured."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._torch import check, words
from ..._torch.objects import plain
from .._reporting import Callback, reporting
from ._iterate import iterate, warn
from ._points import Points, checked_points, checked_weights, mean_of, placed
from ._problem import Problem
from ._start import carried, start_of
from .coupling import Coupling

__all__ = ["couple", "problem_of", "solve"]

_WIDE = 64  # times the costs: an eps from which float32 does not do
_LOST = 1e-3  # of a logit: the rounding of costs over eps that a relaxed marginal does not show


def solve(
    x: Tensor,
    y: Tensor,
    blur: float,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    reach: float | None = None,
    tol: float = 1e-4,
    max_iter: int = 1000,
    start: Coupling | None = None,
    batched: bool = False,
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
        a: Weights of x, [n], floating, >= 0; None: 1/n. Their sum is taken out, unless there is a
            reach.
        b: Weights of y, [m].
        reach: sqrt(rho) > 0, in the unit of the points, where mass may stay behind, appear and
            vanish (unbalanced transport): mass goes not much farther. The sums of a and b then
            count, and may differ. None: every point gives and gets its weight.
        tol: The marginal error at which to stop: sum_j |sum_i P_ij - b_j|, or with a reach that
            relative to what the best marginal would be, see `Coupling`. In float32 it cannot
            fall below some 1e-7 times the cost of a pair over eps; float64 takes twice the time.
        max_iter: The largest number of iterations, of two passes over all pairs each.
        start: A coupling to start from: of points that have moved a little, of a part of them, of
            another blur or reach, or one that has not converged.
        batched: Whether these are G problems in one call: x ``[G, n, *E]``, y ``[G, m, *E]``,
            a [G, n], b [G, m]. Each has its own stop test; a fraction of the time of a loop
            where they are small. All results then have a leading axis of G.
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
        problem = problem_of(x, y, blur, a, b, reach, batched)
        return couple(problem, start, tol, max_iter, batched, report)


def couple(
    problem: Problem,
    start: Coupling | None,
    tol: float,
    max_iter: int,
    batched: bool,
    report: Callback = lambda done, total: None,
) -> Coupling:
    """`solve` of a problem; it warns where it does not converge."""
    if start is None:
        g = start_of(problem)
    elif isinstance(start, Coupling):
        g = carried("start", start._problem, start._state.f, problem)
    else:
        raise TypeError(f"start: expected a Coupling, got {type(start).__name__}")
    state = iterate(problem, g, tol, max_iter, report)
    warn(state, tol, problem.x.rows.dtype)
    return Coupling(problem, state, batched)


def problem_of(
    x: Tensor,
    y: Tensor,
    blur: float,
    a: Tensor | None = None,
    b: Tensor | None = None,
    reach: float | None = None,
    batched: bool = False,
) -> Problem:
    """The arguments of `solve`, checked, about their means; with x and y the same object and no b,
    the problem of a set with itself."""
    points, itself = checked_points("x", x, batched), x is y and b is None
    others = points if itself else checked_points("y", y, batched)
    given = check.positive("blur", blur)
    far = None if reach is None else check.positive("reach", reach)
    if others.shape[2:] != points.shape[2:] or len(others) != len(points):
        lead = [len(x), "m"] if batched else ["m"]
        want = f"shape {words.shape([*lead, *points.shape[2:]])} to go with x of shape {[*x.shape]}"
        raise check.mismatch("y", want, [*y.shape])
    check.same("y", y, "x", x)
    first = checked_weights("a", a, "x", points, batched)
    second = first if itself else checked_weights("b", b, "y", others, batched)
    sets = [(points.detach(), first), (others.detach(), second)]
    if far is None:
        sets = [(rows, w / w.sum(1, keepdim=True)) for rows, w in sets]
        means = [mean_of(*one) for one in sets]
    else:
        masses = torch.stack([w.sum(1, keepdim=True) for _, w in sets])
        apart = torch.stack([mean_of(*one) for one in sets])
        means = [(masses / masses.sum(0) * apart).sum(0)] * 2
    unit = 2.0 ** math.floor(math.log2(given))
    framed = [
        placed(*one, mean, unit) for one, mean in zip(sets[: 1 + (not itself)], means, strict=False)
    ]
    return _computed(framed[0], framed[-1], given, far)


def _computed(x: Points, y: Points, blur: float, reach: float | None) -> Problem:
    """The problem in the dtype of computation: that of the points, but float64 where eps is so much
    larger than the costs that these would drown in the rounding of the logits, of order 1, or so
    much smaller that points out of reach, whose potentials are as large as their costs, would take
    the digits of those that have a partner.
    """
    eps = (blur / x.unit) ** 2
    spread = lambda p: p.total(p.rows.square().sum(2)) / p.mass
    cost = float((spread(x) + spread(y)).amin()) / 2
    largest = sum(float(p.rows.norm(dim=2).amax()) for p in (x, y))
    lost = 0.0 if reach is None else torch.finfo(x.dtype).eps * largest**2 / (2 * eps)
    dtype = x.dtype if eps <= _WIDE * cost and lost <= _LOST else torch.float64
    limit = torch.finfo(dtype).max ** 0.5 / 4  # whose square has room for a sum
    if not largest <= limit:
        least = largest * x.unit / limit
        raise check.mismatch("blur", f"at least {least:.1e} for points so far apart", f"{blur:g}")
    sigma = torch.tensor(blur / x.unit, dtype=dtype, device="cpu").item()
    rho = None if reach is None else (reach / x.unit) ** 2
    first = x.to(dtype)
    return Problem(first, first if x is y else y.to(dtype), sigma, rho)
