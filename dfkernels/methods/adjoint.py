"""Adjoint guidance: the gradient of a loss on x_0 carried back along a sampler's path, and descent
on x_t.

    dlam/dt = -f lam - (g^2/2) F lam,  lam_t = dL/dx_t  (eq. 18)
    d(alpha lam)/ds = -alpha sigma F (alpha lam),  s = sigma/alpha
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._fisher_operator import FisherOperator
from .._torch import check, diagnosis
from .._torch.shapes import column
from ..law import Law
from ._reporting import Callback, reporting
from .denoiser import Denoiser
from .endpoint import FORMS, fisher
from .grid import Trajectory, nodes
from .samplers import sample

__all__ = ["Guided", "adjoint", "guide"]

Operator = Callable[[Tensor, Tensor], FisherOperator]


def adjoint(
    trajectory: Trajectory,
    gradient: Tensor,
    denoiser: Denoiser,
    form: str | Operator = "vjp",
    *,
    order: int = 1,
    normalise: bool = False,
    cloud: Law | None = None,
    trace: Callable[[Tensor, Tensor], Tensor] | None = None,
    **conditions: object,
) -> Trajectory:
    """Carries the gradient of a loss on x_0 back along a sampler's path:

    lam_t = M lam_s, M = (alpha_s/alpha_t) I + (sigma_s - sigma_t alpha_s/alpha_t) sigma_t F_t,
    back over the steps t -> s.

    M is the Jacobian of a DDIM step: on a DDIM path the form "vjp" gives what autograd through the
    solver gives, and "exact" does for the ideal denoiser, without keeping any graph. On another
    solver's path this is eq. 18 by the exponential Euler method.

    Args:
        trajectory: from `sample`, all states kept.
        gradient: [B, *E], dL/dx at its last state.
        form: one of `endpoint.FORMS`, or a callable operator(x, t) -> FisherOperator. "paper" and
            "centred" take the posterior mean, and x0 beyond the last node, from the path's steps,
            where d(x/alpha)/ds = eps: they call no network.
        order: 1, or 2: eq. 18 by Heun's method, with two products per step, for paths of second
            order.
        normalise: scale each sample's lam to largest entry 1 at every node: only directions are
            kept, and nothing overflows.
        cloud, trace: see `endpoint.fisher`.
        conditions: keyword arguments of the network, as in the sampling.

    Returns:
        The gradients at all nodes, in the trajectory's order, without a graph; the first is dL/dx
        at the noisy end.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
        RuntimeError: An unstable form overflows.
    """
    path = nodes(denoiser.schedule, trajectory.t)
    total = len(path.t) - 1
    if len(trajectory.x) != total + 1:
        expected = f"a state for each of its {total + 1} times"
        raise check.mismatch("trajectory", expected, f"{len(trajectory.x)}: sample with keep=None")
    check.like("gradient", gradient, "x", trajectory.x[-1])
    diagnosis.finite("gradient", gradient.detach())
    order = check.integer("order", order, 1, 2)
    if not callable(form):
        check.choice("form", form, FORMS)
    denoiser.warn_in_training("adjoint")
    denoiser = denoiser.bind(**conditions)

    alpha, sigma, s = (level.tolist() for level in path[1:])
    states = [x.detach() for x in trajectory.x]

    def mean(i: int) -> Tensor:
        j = min(i, total - 1)  # eps of the step at this node
        eps = (states[j + 1] / alpha[j + 1] - states[j] / alpha[j]) / (s[j + 1] - s[j])
        return (states[i] - sigma[i] * eps) / alpha[i]

    def operator(i: int) -> FisherOperator:
        if callable(form):
            return form(states[i], path.t[i])
        ends = {"x0": mean(total), "mean": mean(i)} if form in ("paper", "centred") else {}
        return fisher(form, states[i], path.t[i], denoiser, **ends, cloud=cloud, trace=trace)

    lams = [gradient.detach()]
    limit = torch.finfo(gradient.dtype).max ** 0.5  # room for the squares in the next product
    with torch.no_grad():
        at_s = operator(total) if order == 2 and total else None
        for i in reversed(range(total)):
            lam, at_t = lams[-1], operator(i)
            scale, slope = alpha[i + 1] / alpha[i], s[i + 1] - s[i]
            if at_s is None:
                new = scale * lam + slope * alpha[i + 1] * sigma[i] * (at_t @ lam)
            else:
                rate = scale * alpha[i + 1] * sigma[i + 1] * (at_s @ lam)
                end = alpha[i] * sigma[i] * (at_t @ (scale * lam + slope * rate))
                new, at_s = scale * lam + slope / 2 * (rate + end), at_t
            if normalise:
                new = new / _norm(new, torch.inf)
            if not bool((new.abs() < limit).all()):
                raise RuntimeError(
                    f"adjoint: form {form!r} overflows at t = {path.t[i].item():g}: "
                    "it is unstable on this path"
                )
            lams.append(new)
    return Trajectory(path.t, lams[::-1])


class Guided(NamedTuple):
    """What `guide` returns; x and x0 are each sample's from the step with its lowest loss."""

    x: Tensor  # [B, *E]: at t[0]
    x0: Tensor  # [B, *E]: what it becomes
    losses: Tensor  # [steps + 1, B]: before each step and at the end
    evaluations: int  # calls of the network


def guide(
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    t: Tensor,
    denoiser: Denoiser,
    form: str | Operator = "vjp",
    *,
    steps: int = 10,
    lr: float = 0.1,
    normalise: bool = True,
    method: str = "ddim",
    order: int = 1,
    cloud: Law | None = None,
    trace: Callable[[Tensor, Tensor], Tensor] | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    **conditions: object,
) -> Guided:
    """Moves a noisy x so that the x_0 that it becomes has a lower loss, by gradient descent:

    x <- x - lr |x| lam/|lam|, lam = dL/dx by the adjoint along the path from x = x_{t[0]} to
    x_0 = x_{t[-1]}.

    Args:
        loss: loss(x_0) -> [B], differentiable in x_0 [B, *E], one number per sample.
        x: [B, *E], e.g. sigma times normal noise.
        t: [M + 1], noisiest first, sigma > 0.
        steps: >= 0. Each costs the sampling, M calls of the network (Heun: 2 M), and the adjoint: M
            calls and backward passes for "vjp", 2 M calls for "finite-difference", none for
            "paper", "centred", "isotropic" (unless the trace's network does) and "exact".
        lr: length of a step relative to |x|; with normalise=False the step is -lr lam, which asks
            of a form that the gradient's length is right too.
        method: of `sample`.
        form, order, cloud, trace: of `adjoint`.
        callback: called as callback(done, steps) after each step.
        progress: show a bar on stderr.
        conditions: keyword arguments of the network.

    Returns:
        The best x of each sample with its x_0, the losses of all steps, and the evaluations.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it: `loss` for a result of
            another shape, NaN or inf.
    """
    steps = check.integer("steps", steps, 0)
    lr, before = check.constant("lr", lr), denoiser.evaluations
    check.query("x", x)
    denoiser = denoiser.bind(**conditions)
    how = {"order": order, "normalise": normalise, "cloud": cloud, "trace": trace}
    x, losses = x.detach(), []
    best: tuple[Tensor, Tensor, Tensor] | None = None  # (loss, x, x_0)
    with reporting("guide", callback, progress, steps) as report:
        for i in range(steps + 1):
            with torch.no_grad():
                trajectory = sample(denoiser, x, t, method)
            value, gradient = _value_and_gradient(loss, trajectory.x[-1])
            losses.append(value)
            new = (value, x, trajectory.x[-1])
            best = new if best is None else _better(new, best)
            if i < steps:
                lam = adjoint(trajectory, gradient, denoiser, form, **how).x[0]
                x = x - lr * (_norm(x) / _norm(lam) * lam if normalise else lam)
                report(i + 1, steps)
    assert best is not None  # there is at least one
    return Guided(best[1], best[2], torch.stack(losses), denoiser.evaluations - before)


def _better(
    new: tuple[Tensor, Tensor, Tensor], best: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Each sample's (loss, x, x_0) from the one with the lower loss."""
    lower = new[0] < best[0]
    wide = lower.view(-1, *[1] * (new[1].ndim - 1))
    return (
        torch.where(lower, new[0], best[0]),
        torch.where(wide, new[1], best[1]),
        torch.where(wide, new[2], best[2]),
    )


def _norm(x: Tensor, p: float = 2) -> Tensor:
    """The norm of each sample, [B, 1, ...], never 0."""
    norm = torch.linalg.vector_norm(check.query("x", x), p, 1)
    return column(norm.clamp_min(torch.finfo(x.dtype).tiny), x)


def _value_and_gradient(loss: Callable[[Tensor], Tensor], x0: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.enable_grad():
        # a copy: what inference mode has made cannot require grad
        x0 = x0.detach().clone().requires_grad_()
        value = loss(x0)
        check.tensor("loss", value)
        if value.shape != x0.shape[:1]:
            raise check.mismatch(
                "loss", f"shape [{len(x0)}], one number per sample", list(value.shape)
            )
        diagnosis.finite("loss", value.detach())
        (gradient,) = torch.autograd.grad(value.sum(), x0)
    return value.detach(), gradient
