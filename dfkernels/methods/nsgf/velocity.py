"""The velocity of the Sinkhorn gradient flow, a difference of two posterior means."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._torch import check
from ..._torch.objects import plain
from ..sinkhorn import Coupling, NotConverged, solve

__all__ = ["Velocity", "found", "itself", "velocity", "warn"]


@dataclass(frozen=True)
class Velocity:
    """What `velocity` returns.

    Attributes:
        value: v at the particles, ``[n, *E]``, without a graph.
        xy: The coupling of the particles with the target.
        xx: The coupling of the particles with themselves.
    """

    value: Tensor
    xy: Coupling
    xx: Coupling

    @property
    def marginal_error(self) -> float:
        """The larger one of the two couplings."""
        return max(self.xy.marginal_error, self.xx.marginal_error)


def velocity(
    x: Tensor,
    y: Tensor,
    blur: float,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    tol: float = 1e-4,
    max_iter: int = 1000,
    start: Velocity | None = None,
) -> Velocity:
    """Computes the velocity at which particles descend the Sinkhorn divergence to a target.

    v(x_i) = T_xy(x_i) - T_xx(x_i), minus the gradient of `sinkhorn.divergence` in x_i over a_i.

    Args:
        x: Particles ``[n, *E]``, float32 or float64: the dtype of computation.
        y: Points of the target ``[m, *E]``, in the same dtype, on the same device.
        blur: sqrt(eps) > 0, in the unit of the points, as in `sinkhorn.solve`.
        a: Weights of x, [n], floating, >= 0; their sum is taken out. None: uniform.
        b: Weights of y, [m].
        tol: The marginal error at which either plan is taken for solved. The relative error of v is
            about as large, and some times larger at a small blur: tol=1e-7, for which the points
            have to be in float64, gives six digits.
        max_iter: The largest number of iterations of either plan.
        start: The velocity before the particles moved a little, whose plans are near.

    Returns:
        The `Velocity`, without a graph.

    Warns:
        NotConverged: A plan stopped above tol; the message says at what.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """
    if start is not None:
        check.instance("start", start, Velocity, "a Velocity")
    out = found(x, y, blur, a, b, tol, max_iter, start)
    warn("velocity", [out.marginal_error], tol, stacklevel=3)
    return out


def found(
    x: Tensor,
    y: Tensor,
    blur: float,
    a: Tensor | None,
    b: Tensor | None,
    tol: float,
    max_iter: int,
    start: Velocity | None,
) -> Velocity:
    """`velocity` without its warning, for callers that warn of many at once, by `warn`."""
    check.query("x", x)
    before = (None, None) if start is None else (start.xy, start.xx)
    with torch.no_grad(), plain(x.device):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConverged)
            xy = solve(x, y, blur, a, b, tol=tol, max_iter=max_iter, start=before[0])
        xx = itself(x, blur, a, tol, max_iter, before[1])
        return Velocity(xy.barycentric_map() - xx.barycentric_map(), xy, xx)


def itself(
    x: Tensor,
    blur: float,
    a: Tensor | None,
    tol: float,
    max_iter: int,
    start: Coupling | None = None,
) -> Coupling:
    """The coupling of a set with itself, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConverged)
        return solve(x, x, blur, a, tol=tol, max_iter=max_iter, start=start)


def warn(name: str, errors: Iterable[float], tol: float, stacklevel: int) -> None:
    """Warns, once, of those velocities whose marginal error is above tol."""
    errors = list(errors)
    above = [error for error in errors if error > tol]
    if above:
        many = f"{len(above)} of {len(errors)} velocities" if len(errors) > 1 else "a velocity"
        warnings.warn(
            f"{name}: {many} stopped at a marginal error of up to {max(above):.1e}, "
            f"tol = {tol:.1e}; raise max_iter, blur or tol, or give the points in float64",
            NotConverged,
            stacklevel=stacklevel,
        )
