"""Deterministic samplers of the probability-flow ODE d(x/alpha) = eps ds, s = sigma/alpha.

    ddim     first order, 1 evaluation of the network per step:
             x_{i+1} = (alpha_{i+1}/alpha_i) x_i + alpha_{i+1} (s_{i+1} - s_i) eps_i
    heun     second order, 2 evaluations: eps_i above is averaged with the eps that the DDIM step
             arrives at
    o-belm   second order, 1 evaluation, exactly invertible; two states, the first step is DDIM's

Nodes are numbered in the order of sampling, noisiest first (O-BELM's paper counts from the data
end). With x/alpha, all of it is the same for every schedule on the same noise levels s.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._torch import check
from ._reporting import Callback, reporting
from ._start import warn_of_little_noise
from .denoiser import Denoiser
from .grid import Nodes, Trajectory, nodes
from .solvers import EULER, HEUN, Tableau, advanced, slopes

__all__ = ["METHODS", "invert", "sample"]

METHODS = ("ddim", "heun", "o-belm")
_TABLEAUS = {"ddim": EULER, "heun": HEUN}
Advance = Callable[[int, list[Tensor]], Tensor]


def sample(
    denoiser: Denoiser,
    x: Tensor,
    t: Tensor,
    method: str = "ddim",
    *,
    second: Tensor | None = None,
    keep: int | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    **conditions: object,
) -> Trajectory:
    """Samples along the probability-flow ODE, from x = x_{t[0]} over the nodes t to x_{t[-1]}.

    >>> path = sample(denoiser, sigma * noise, t, "heun", label=label)
    >>> x_0 = denoiser(path.x[-1], path.t[-1], label=label)

    Args:
        denoiser: a network, or the ideal one of a data set (`Denoiser.exact`).
        x: [B, *E], float32 or float64; alpha x_0 + sigma eps at t[0], e.g. sigma times normal
            noise.
        t: [M + 1], floating or integer, noisiest first, e.g. `grid.time_grid(schedule, steps,
            noise)`, or the timesteps of a table; sigma > 0 at the last one too: ask the denoiser
            for x_0 there.
        method: "ddim" (Song et al. 2021, M evaluations of the network), "heun" (Karras et al. 2022,
            Alg. 1 without churn, 2 M), "o-belm" (Wang et al. 2024, M; with `second`, M - 1).
        second: the state at t[1], [B, *E], for O-BELM: with the last two states of `invert` the
            sampling goes back the way that the inversion came. Default: a DDIM step.
        keep: how many states the trajectory holds, the last ones; default all. `invert` needs 2.
        callback: called as callback(done, total) after each of the M steps.
        progress: show a bar on stderr.
        conditions: keyword arguments of the network, such as class labels.

    Differentiable through the denoiser; sample under torch.no_grad() otherwise. A RuntimeWarning
    says where x is too small for its noise, on the CPU.

    Returns:
        The trajectory; its last state, `.x[-1]`, is the sample at the lowest noise level.

    Raises:
        TypeError, ValueError: An argument is wrong (sigma = 0 or alpha = 0 at a node, noise that
            does not fall), or the network returns another shape, NaN or inf; the message names it.
    """
    check.query("x", x)
    check.choice("method", method, METHODS)
    path = nodes(denoiser.schedule, t)
    total = len(path.t) - 1
    keep = _states_held(keep, total + 1)
    states = [x]
    if second is not None:
        if method != "o-belm" or total == 0:
            raise check.mismatch("second", "None unless method='o-belm' and M >= 1", "a tensor")
        check.like("second", second, "x", x)
        states.append(second)
    denoiser.warn_in_training("sample")
    warn_of_little_noise("sample", x, path)
    denoiser = denoiser.bind(**conditions)
    if method == "o-belm":
        advance = _o_belm(denoiser, path)
    else:
        advance = _runge_kutta(_TABLEAUS[method], denoiser, path)
    with reporting("sample", callback, progress, total) as report:
        for i in range(len(states) - 1, total):
            states.append(advance(i, states))
            del states[: -max(keep, 2)]
            report(i + 1, total)
    return Trajectory(path.t[-keep:], states[-keep:])


def invert(
    denoiser: Denoiser,
    x: Tensor,
    t: Tensor,
    *,
    second: Tensor | None = None,
    keep: int | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    **conditions: object,
) -> Trajectory:
    """Undoes a sampling by O-BELM, from x = x_{t[-1]} back to x_{t[0]}: its recursion, solved for
    the oldest of the three states.

    Args:
        denoiser, t, keep, callback, progress, conditions: as for `sample`; the trajectory is in the
            order of passing, noisiest last.
        x: [B, *E], the state at t[-1].
        second: the state at t[-2]; with `trajectory.x[-2]` of a sample it is the sampling undone.
            Default, for an image that was not sampled: a DDIM step towards the noise.

    It takes M - 1 evaluations of the network, M without `second`.

    Exact up to rounding, which the recursion amplifies by up to (first step in s / last step in
    s)^2: on 50 steps from s = 80 to 0.002 the error relative to |x| is 1e-12 (spacing "edm") or
    6e-11 ("log") in float64. In float32 only grids of nearly equal steps can be inverted. Sampling
    itself amplifies where steps grow.

    Returns:
        The trajectory y; `sample(denoiser, y.x[-1], t, "o-belm", second=y.x[-2])` returns to x.

    Raises:
        TypeError, ValueError: As `sample` does.
    """
    check.query("x", x)
    path = nodes(denoiser.schedule, t)
    total = len(path.t) - 1
    keep = _states_held(keep, total + 1)
    states = [x]
    if total == 0:
        if second is not None:
            raise check.mismatch("second", "None where t has one node", "a tensor")
        return Trajectory(path.t, states)
    denoiser.warn_in_training("invert")
    denoiser = denoiser.bind(**conditions)
    if second is None:
        scale, slope = _euler(path.alpha[-1], path.s[-1], path.alpha[-2], path.s[-2])
        second = scale * x + slope * denoiser.eps(x, path.t[-1])
    check.like("second", second, "x", x)
    states.append(second)
    table = _o_belm_table(path)
    with reporting("invert", callback, progress, total) as report:
        report(1, total)
        for i in range(total - 1, 0, -1):
            older, old, slope = table[i].tolist()
            eps = denoiser.eps(states[-1], path.t[i])
            states.append((states[-2] - old * states[-1] - slope * eps) / older)
            del states[: -max(keep, 2)]
            report(total - i + 1, total)
    return Trajectory(path.t.flip(0)[-keep:], states[-keep:])


def _states_held(keep: int | None, most: int) -> int:
    return most if keep is None else min(check.integer("keep", keep, 1), most)


def _euler(alpha: Tensor, s: Tensor, alpha_to: Tensor, s_to: Tensor) -> tuple[Tensor, Tensor]:
    """The coefficients of x and eps in a DDIM step, in either direction."""
    return alpha_to / alpha, alpha_to * (s_to - s)


def _ddim_table(path: Nodes) -> Tensor:
    """The coefficients of x_i and eps_i in x_{i+1}, [M, 2]."""
    return torch.stack(_euler(path.alpha[:-1], path.s[:-1], path.alpha[1:], path.s[1:]), 1)


def _o_belm_table(path: Nodes) -> Tensor:
    """The coefficients of x_{i-1}, x_i and eps_i in x_{i+1}, [M, 3]; with xbar = x/alpha,
    h_i = s_i - s_{i+1} and r = h_i/h_{i-1},

    xbar_{i+1} = r^2 xbar_{i-1} + (1 - r^2) xbar_i - (r + 1) h_i eps_i.
    """
    alpha, h = path.alpha, -path.s.diff()
    ratio = h[1:] / h[:-1]
    older = ratio**2 * alpha[2:] / alpha[:-2]
    old = (1 - ratio**2) * alpha[2:] / alpha[1:-1]
    slope = -(ratio + 1) * h[1:] * alpha[2:]
    first = torch.nn.functional.pad(_ddim_table(path)[:1], (1, 0))
    return torch.cat([first, torch.stack([older, old, slope], 1)])


def _runge_kutta(tableau: Tableau, denoiser: Denoiser, path: Nodes) -> Advance:
    """Steps in x/alpha against s, for methods whose slopes are all at nodes."""
    alpha, h = path.alpha.tolist(), path.s.diff().tolist()

    def advance(i: int, states: list[Tensor]) -> Tensor:
        def eps(c: float, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (denoiser.eps(alpha[i + int(c)] * y[0], path.t[i + int(c)]),)

        y = (states[-1] / alpha[i],)
        return alpha[i + 1] * advanced(y, h[i], tableau.b, slopes(tableau, eps, y, h[i]))[0]

    return advance


def _o_belm(denoiser: Denoiser, path: Nodes) -> Advance:
    table = _o_belm_table(path)

    def advance(i: int, states: list[Tensor]) -> Tensor:
        older, old, slope = table[i].tolist()
        x = old * states[-1] + slope * denoiser.eps(states[-1], path.t[i])
        return x + older * states[-2] if i else x

    return advance
