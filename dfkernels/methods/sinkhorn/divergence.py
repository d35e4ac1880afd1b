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
    """What `divergence` returns: the value, a tensor without axes, and the three couplings."""

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
    tol: float = 1e-4,
    max_iter: int = 1000,
    start: Divergence | None = None,
) -> Divergence:
    """Computes the debiased Sinkhorn divergence between two weighted sets of points, as a loss.

    S = W(x, y) - W(x, x)/2 - W(y, y)/2, with W the optimal `Coupling.cost`. It is 0 where both are
    the same, positive elsewhere, and convex in the weights; blur takes it from half the squared
    Wasserstein distance (small) to half the squared distance of the means (large).

    Args:
        x: Points ``[n, *E]``, float32 or float64.
        y: Points ``[m, *E]``, in the same dtype, on the same device.
        blur: sqrt(eps) > 0, in the unit of the points, as in `solve`.
        a: Weights of x, [n], floating, >= 0; their sum is taken out. None: uniform.
        b: Weights of y, [m].
        tol: The marginal error at which each of the three problems stops. The value is wrong by
            its square or so, the gradient by its first power.
        max_iter: Iterations of each problem.
        start: The result for points that have moved a little since, to start from.

    Returns:
        Divergence(value, xy, xx, yy). The value has first derivatives in x, y, a and b in reverse
        mode, at fixed potentials (by the envelope theorem, without the iterations):
        a_i (xx.barycentric_map() - xy.barycentric_map())_i in x_i, a pass each, and f_xy - f_xx in
        a. Rounding can make it negative by some 1e-7 of the costs in float32.

    Warns:
        NotConverged: One of the three did not; the message says at what it stopped.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """
    check.positive("tol", tol)
    check.integer("max_iter", max_iter, 1)
    if start is not None and not isinstance(start, Divergence):
        raise TypeError(f"start: expected a Divergence, got {type(start).__name__}")
    before = (None, None, None) if start is None else start[1:]
    check.query("x", x)
    with torch.no_grad(), plain(x.device):
        problem = problem_of(x, y.clone() if x is y else y, blur, a, b)
        xy = couple(problem, before[0], tol, max_iter)
        xx = couple(_itself(problem), before[1], tol, max_iter)
        yy = couple(_itself(problem.transposed), before[2], tol, max_iter)
    weights = [None if w is None else w / w.sum() for w in (a, b)]
    return Divergence(_Value.apply(x, y, *weights, xy, xx, yy), xy, xx, yy)


def _itself(problem: Problem) -> Problem:
    return Problem(problem.x, problem.x, problem.sigma)


def _own(coupling: Coupling) -> Tensor:
    """The potential of a set with itself, for both sides."""
    return (coupling._f + coupling._g) / 2


class _Value(torch.autograd.Function):
    """The value of a divergence, with its gradient at fixed potentials."""

    @staticmethod
    def forward(ctx: Any, x, y, a, b, xy: Coupling, xx: Coupling, yy: Coupling) -> Tensor:
        ctx.save_for_backward(x, y, a, b)
        ctx.couplings = xy, xx, yy
        p = xy._problem
        first = p.x.weights @ (xy._f - _own(xx))
        second = p.y.weights @ (xy._g - _own(yy))
        between = (p.x.mean - p.y.mean).square().sum() / 2
        return ((first + second) * p.x.unit**2 + between).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        xy, xx, yy = ctx.couplings
        sides = (xy, xx), (xy.T, yy)
        given, out = ctx.saved_tensors, []
        with torch.no_grad():
            for k, of in enumerate((_in_points, _in_points, _in_weights, _in_weights)):
                wanted = ctx.needs_input_grad[k]
                out.append(of(grad, *sides[k % 2], given[k]) if wanted else None)
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


def _in_points(grad: Tensor, cross: Coupling, itself: Coupling, like: Tensor) -> Tensor:
    p = itself._problem
    moved = itself.barycentric_map() - cross.barycentric_map()
    weights = p.x.weights.to(moved.dtype).view(-1, *[1] * (moved.dim() - 1))
    return grad * weights * moved


def _in_weights(grad: Tensor, cross: Coupling, itself: Coupling, like: Tensor) -> Tensor:
    p = cross._problem
    found = (cross._f - _own(itself)) * p.x.unit**2
    found = found + p.x.rows.double() @ (p.x.mean - p.y.mean) * p.x.unit
    return grad.to(like.dtype) * found.to(like.dtype)
