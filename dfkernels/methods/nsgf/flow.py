"""The Sinkhorn gradient flow of particles, by explicit Euler steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch import check
from ..._torch.objects import plain
from .._reporting import Callback, reporting
from ..grid import in_short
from .velocity import found, itself, warn

__all__ = ["Flow", "flow", "step_size"]


class Flow(NamedTuple):
    """What `flow` returns: the states before, between and after its steps.

    Attributes:
        t: The time of each state, step number times eta, [steps + 1], float64.
        x: The states, each ``[n, *E]``.
        divergence: The Sinkhorn divergence of each state to the target, [steps + 1], float64.
        marginal_error: The largest of the plans from which that and the velocity came, [steps + 1],
            float64.
    """

    t: Tensor
    x: list[Tensor]
    divergence: Tensor
    marginal_error: Tensor

    __repr__ = in_short


def flow(
    x: Tensor,
    y: Tensor,
    blur: float,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    steps: int,
    eta: float = 1.0,
    tol: float = 1e-4,
    max_iter: int = 1000,
    callback: Callback | None = None,
    progress: bool = False,
) -> Flow:
    """Moves particles down the Sinkhorn divergence to a target: x <- x + eta v(x).

    Each step starts its two plans from those of the step before. A step of eta = 1 at a blur much
    smaller than the distances between the points is one optimal-transport map.

    Args:
        x: Particles ``[n, *E]``, float32 or float64.
        y: Points of the target ``[m, *E]``, in the same dtype, on the same device.
        blur: sqrt(eps) > 0, in the unit of the points: the flow does not resolve what is smaller,
            and approaches the target the more slowly the larger it is.
        a: Weights of x, [n]. None: uniform.
        b: Weights of y, [m].
        steps: How many, at least 1.
        eta: The step size, 0 < eta < 2. Next to the target v is about y - x, so that a step
            multiplies the distance that is left by |1 - eta|: no step size from 2 on converges.
        tol: The marginal error of the plans, as in `velocity`.
        max_iter: The largest number of iterations of each plan.
        callback: Called as callback(done, steps) after each step.
        progress: Whether to show a bar on stderr.

    A run that was interrupted is taken up with the last state as x; only its first plans then start
    anew.

    Returns:
        The `Flow`, without a graph. No plan is kept: memory is that of the states.

    Warns:
        NotConverged: Some plans stopped above tol; the message says how many, and at what.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """
    steps, eta = check.integer("steps", steps, 1), step_size(eta)
    check.query("x", x)
    bar = reporting("nsgf.flow", callback, progress, steps)
    with torch.no_grad(), plain(x.device), bar as report:
        states, values, errors, v = [x.detach().clone()], [], [], None
        for k in range(steps + 1):
            v = found(states[-1], y, blur, a, b, tol, max_iter, v)
            values.append(v.xy.cost - v.xx.cost / 2)
            errors.append(v.marginal_error)
            if k < steps:
                states.append(states[-1] + eta * v.value)
                report(k + 1, steps)
        own = itself(y, blur, b, tol, max_iter)
        values = torch.tensor(values, dtype=torch.float64, device="cpu") - own.cost / 2
        t = eta * torch.arange(steps + 1, dtype=torch.float64, device="cpu")
        worst = torch.tensor(errors, dtype=torch.float64, device="cpu")
    warn("flow", [max(error, own.marginal_error) for error in errors], tol, stacklevel=3)
    return Flow(t, states, values, worst.clamp_min(own.marginal_error))


def step_size(eta: float) -> float:
    """A step size of explicit Euler.

    Raises:
        TypeError, ValueError: It is no number in (0, 2).
    """
    value = check.positive("eta", eta)
    if value >= 2:
        raise check.mismatch(
            "eta",
            "0 < eta < 2 (a step multiplies the distance to the target by |1 - eta|: at eta = 2 "
            "particles jump to and fro, beyond they run away)",
            f"{value:g}",
        )
    return value
