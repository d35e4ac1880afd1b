"""The Sinkhorn divergence: entropic transport without its bias, as a loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._torch import check
from ..._torch.objects import plain
from ._problem import Problem
from .coupling import Coupling
from .solve import couple, problem_of

__all__ = ["Divergence", "divergence"]


class Divergence(NamedTuple):
    """What `divergence` returns: the value, a tensor without axes or batched [G], and the three
    couplings."""

    value: Tensor
    xy: Coupling
    xx: Coupling
    yy: Coupling


def divergence(
    x: Tensor,
    y: Tensor,
    blur: float,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    reach: float | None = None,
    tol: float = 1e-4,
    max_iter: int = 1000,
    start: Divergence | None = None,
    batched: bool = False,
) -> Divergence:
    """Computes the debiased Sinkhorn divergence between two weighted sets of points, as a loss.

    S = W(x, y) - W(x, x)/2 - W(y, y)/2, with W the optimal `Coupling.cost`, and with a reach
    eps (sum a - sum b)^2/2 more (Sejourne et al. 2019). It is 0 where both are the same, positive
    elsewhere, and convex in the weights; blur takes it from half the squared Wasserstein distance
    (small) to half the squared distance of the means (large).

    Args:
        x: Points ``[n, *E]``, float32 or float64.
        y: Points ``[m, *E]``, in the same dtype, on the same device.
        blur: sqrt(eps) > 0, in the unit of the points, as in `solve`.
        a: Weights of x, [n], floating, >= 0; None: 1/n. Their sum is taken out, unless there is a
            reach.
        b: Weights of y, [m].
        reach: sqrt(rho) > 0, how far mass goes at most or so, as in `solve`: what is farther than
            a few times that from the other set counts by its mass, as in a divergence of densities.
            None: all of it has to go.
        tol: The marginal error at which each of the three problems stops. The value is wrong by
            its square or so, the gradient by its first power.
        max_iter: Iterations of each problem.
        start: The result for points that have moved a little since, to start from.
        batched: Whether these are G pairs of sets, as in `solve`; the value is then [G].

    Returns:
        Divergence(value, xy, xx, yy). The value has first derivatives in x, y, a and b in reverse
        mode, at fixed potentials (by the envelope theorem, without the iterations):
        a_i (xx.barycentric_map() - xy.barycentric_map())_i in x_i, a pass each, and f_xy - f_xx in
        a. With a reach, of rho: p_xy (x - xy.barycentric_map()) - p_xx (x - xx.barycentric_map())
        with p = a exp(-f/rho), the rows' sums, and (rho + eps)(exp(-f_xx/rho) - exp(-f_xy/rho)).
        Rounding can make the value negative by some 1e-7 of the costs in float32.

    Warns:
        NotConverged: One of the three did not; the message says at what it stopped.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """
    check.positive("tol", tol)
    check.integer("max_iter", max_iter, 1)
    if start is not None:
        check.instance("start", start, Divergence, "a Divergence")
    before = (None, None, None) if start is None else start[1:]
    check.query("x", x)
    with torch.no_grad(), plain(x.device):
        problem = problem_of(x, y.clone() if x is y else y, blur, a, b, reach, batched)
        rest = tol, max_iter, batched
        xy = couple(problem, before[0], *rest)
        xx = couple(_itself(problem), before[1], *rest)
        yy = couple(_itself(problem.transposed), before[2], *rest)
    weights = (a, b)
    if reach is None:
        weights = [None if w is None else w / w.sum(-1, keepdim=True) for w in weights]
    return Divergence(_Value.apply(x, y, *weights, xy, xx, yy), xy, xx, yy)


def _itself(problem: Problem) -> Problem:
    return problem._replace(y=problem.x)


def _own(coupling: Coupling) -> Tensor:
    """The potential of a set with itself, for both sides; where there is no weight, on which the
    iteration does not look, the best for those that have."""
    f, g = coupling._state[:2]
    return torch.where(coupling._problem.x.weights > 0, (f + g) / 2, f)


def _value(xy: Coupling, xx: Coupling, yy: Coupling) -> Tensor:
    """[G]; what is large in each of the three and cancels is left out."""
    p, (f, g) = xy._problem, xy._state[:2]
    if p.rho is None:
        first, second = p.x.total(f - _own(xx)), p.y.total(g - _own(yy))
        apart = (p.x.mean - p.y.mean).square().sum(1) / 2
        return (first + second) * p.x.unit**2 + apart
    alone = [c._problem.dual(*c._state[:2]) for c in (xx, yy)]
    moved = p.dual(f, g) - sum(alone) / 2
    return (moved + p.eps * (p.y.mass - p.x.mass) / 2) * p.x.unit**2


class _Value(torch.autograd.Function):
    """The value of a divergence, with its gradient at fixed potentials."""

    @staticmethod
    def forward(ctx: Any, x, y, a, b, xy: Coupling, xx: Coupling, yy: Coupling) -> Tensor:
        ctx.save_for_backward(x, y, a, b)
        ctx.couplings = xy, xx, yy
        return xy._out(_value(xy, xx, yy).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        xy, xx, yy = ctx.couplings
        sides = (xy, xx), (xy.T, yy)
        given, out = ctx.saved_tensors, []
        with torch.no_grad():
            for k, of in enumerate((_in_points, _in_points, _in_weights, _in_weights)):
                found = None
                if ctx.needs_input_grad[k]:
                    found = of(*sides[k % 2], given[k])
                    found = grad.view(*grad.shape, *[1] * (found.dim() - grad.dim())) * found
                out.append(found)
        out = [None if t is None else _Once.apply(t, grad, *given) for t in out]
        return *out, None, None, None


class _Once(torch.autograd.Function):
    """A gradient that has no derivative: to take it for a constant would be wrong in silence."""

    @staticmethod
    def forward(ctx: Any, found: Tensor, *of: Tensor | None) -> Tensor:
        return found.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            "divergence: expected one derivative, got two: its gradient holds the potentials fixed"
        )


def _in_points(cross: Coupling, itself: Coupling, like: Tensor) -> Tensor:
    """Where mass goes without the other set, less where it goes with it, each times the mass."""
    found = []
    for one in (itself, cross):
        p, f = one._problem, one._state.f
        kept = p.x.weights * p.log_share(f).exp()
        move = one.barycentric_map() - like
        kept = one._out(kept).to(move.dtype)
        found.append(kept.view(*kept.shape, *[1] * (move.dim() - kept.dim())) * move)
    return found[0] - found[1]


def _in_weights(cross: Coupling, itself: Coupling, like: Tensor) -> Tensor:
    p, f, own = cross._problem, cross._state.f, _own(itself)
    if p.rho is None:
        found = f - own + p.level()
    else:
        shares = itself._problem.log_share(own).expm1() - p.log_share(f).expm1()
        found = (p.rho + p.eps) * shares
    return cross._out(found * p.x.unit**2).to(like.dtype)
