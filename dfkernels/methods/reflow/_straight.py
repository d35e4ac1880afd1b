"""The probability-flow ODE of any schedule as a straight flow, in both directions, ends included.

With tau = alpha/(alpha + sigma) and z = x/(alpha + sigma) it is dz/dtau = E[x_1 - x_0 | z], x_1 the
data and x_0 the noise. Euler's step is DDIM's; nothing divides by alpha or sigma.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch.shapes import column
from ...schedule import Schedule
from ..denoiser import Denoiser, expect_denoiser
from ..grid import checked_times
from ..solvers import EULER, HEUN, Tableau, advanced, slopes

__all__ = [
    "TABLEAUS",
    "Path",
    "advance",
    "inverted",
    "mixed",
    "path_of",
    "time_at",
    "velocity",
]

TABLEAUS = {"ddim": EULER, "heun": HEUN}
MOST_ITERATIONS = 200


class Path(NamedTuple):
    """Times t [M + 1] in float64, and tau and alpha + sigma there, as numbers; tau rises."""

    t: Tensor
    tau: list[float]
    scale: list[float]


def velocity(denoiser: Denoiser, x: Tensor, t: float | Tensor, **conditions: object) -> Tensor:
    """The velocity of the straight flow, E[x_1 - x_0 | x_t = x], [B, *E]: the data less the noise
    that a denoiser predicts. One call of the network.

    Args:
        denoiser: of any schedule; of a "flow" network with schedule.RectifiedFlow it is the
            network's output itself.
        x: [B, *E], float32 or float64, in the schedule's own scale, alpha x_1 + sigma x_0.
        t: a number, [] or [B], in the schedule's range.
        conditions: keyword arguments of the network.

    Raises:
        TypeError, ValueError: As the denoiser does.
    """
    expect_denoiser(denoiser)
    eps, mean = denoiser.both(x, t, **conditions)
    return mean - eps


def time_at(schedule: Schedule, tau: Tensor) -> Tensor:
    """The schedule's time at which alpha/(alpha + sigma) is tau, in [0, 1]."""
    return schedule.t_of_log_snr(2 * torch.logit(tau.double()))


def path_of(schedule: Schedule, t: Tensor) -> Path:
    """The nodes t [M + 1], noisiest first.

    Raises:
        TypeError, ValueError: `t` has another shape, or the noise does not fall from node to node.
    """
    t = checked_times(t)
    alpha, sigma = schedule(t)
    scale = alpha + sigma
    tau = alpha / scale
    if bool((tau.diff() <= 0).any()):
        i = int((tau.diff() <= 0).nonzero()[0])
        raise ValueError(
            "t: expected noise that falls from node to node (with RectifiedFlow, t from 0 to 1), "
            f"got t = {t[i].item():g}, then t = {t[i + 1].item():g}"
        )
    return Path(t, tau.tolist(), scale.tolist())


def advance(denoiser: Denoiser, path: Path, tableau: Tableau, z: Tensor, i: int, j: int) -> Tensor:
    """One step from node i to node j, of whichever is noisier, for methods whose slopes are all at
    nodes."""

    def field(c: float, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        k = j if c else i
        return (velocity(denoiser, path.scale[k] * y[0], path.t[k]),)

    y, h = (z,), path.tau[j] - path.tau[i]
    return advanced(y, h, tableau.b, slopes(tableau, field, y, h))[0]


def inverted(step: Callable[[Tensor], Tensor], end: Tensor, start: Tensor, what: str) -> Tensor:
    """The z with step(z) = end, by the fixed point of z + end - step(z), which contracts where the
    step moves neighbours by less than their distance.

    Args:
        step: a step of a solver.
        end: [B, *E].
        start: a guess of z.
        what: the step in words.

    Raises:
        ValueError: It does not contract.
    """
    tolerance = 8 * torch.finfo(end.dtype).eps
    z, least, patience = start, float("inf"), 0
    for _ in range(MOST_ITERATIONS):
        missing = end - step(z)
        z = z + missing
        size = float((missing.abs() / (1 + end.abs())).amax()) if end.numel() else 0.0
        if size <= tolerance:
            return z
        patience = 0 if size < least / 2 else patience + 1
        least = min(least, size)
        if patience > 20:  # rounding in the network: as near as it comes
            break
    if least <= 100 * tolerance:
        return z
    raise ValueError(
        f"t: expected steps short enough to be inverted, got {what}, where the fixed point leaves "
        f"{least:.1g}: take more nodes there"
    )


def mixed(tau: float | Tensor, noise: Tensor, sample: Tensor) -> Tensor:
    """(1 - tau) noise + tau sample, [B, *E], for a number or [B]."""
    if isinstance(tau, Tensor):
        return column(1 - tau, noise) * noise + column(tau, noise) * sample
    return (1 - tau) * noise + tau * sample
