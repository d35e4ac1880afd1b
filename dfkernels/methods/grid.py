"""Time grids: the nodes of a solver, in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import check
from ..schedule import Schedule

__all__ = [
    "Nodes",
    "Trajectory",
    "checked_times",
    "in_short",
    "nodes",
    "noise_range",
    "time_grid",
    "times_of",
]

SPACINGS = ("log", "edm", "time")


class Nodes(NamedTuple):
    """Times and levels at the nodes of a solver, s = sigma/alpha, each [M + 1] in float64, noisiest
    first (M >= 0 steps).
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    s: Tensor


def in_short(path: Any) -> str:
    """A path, with its states `x` and their times `t`, in one line: a list of tensors prints all
    numbers of each.
    """
    t, states = path.t, path.x
    of_each = f" {list(states[0].shape)} {states[0].dtype}" if states else ""
    ends = f", t from {t[0]:g} to {t[-1]:g}" if len(t) and not check.values_hidden(t) else ""
    return f"{type(path).__name__}({len(states)} states{of_each}{ends})"


class Trajectory(NamedTuple):
    """The path of a solver: states x[i] [B, *E] at the times t [M + 1] (float64), in the order in
    which it passed them.
    """

    t: Tensor
    x: list[Tensor]

    __repr__ = in_short


def noise_range(noise: tuple[float, float]) -> tuple[float, float]:
    """A range of noise levels as two numbers (low, high).

    Raises:
        TypeError, ValueError: `noise` is no pair of finite levels sigma/alpha, 0 < low < high.
    """
    try:
        low, high = noise
    except (TypeError, ValueError):
        raise TypeError(
            f"noise: expected a pair of levels sigma/alpha, got {noise!r:.80}"
        ) from None
    low, high = check.constant("noise", low), check.constant("noise", high)
    if not 0 < low < high:
        raise check.mismatch("noise", "0 < noise[0] < noise[1] (levels sigma/alpha)", noise)
    return low, high


def time_grid(
    schedule: Schedule,
    steps: int,
    noise: tuple[float, float],
    spacing: str = "log",
    *,
    rho: float | None = None,
) -> Tensor:
    """The times of a solver's steps, [steps + 1] in float64, noisiest first.

    Args:
        schedule: maps t to alpha and sigma.
        steps: at least 1.
        noise: (low, high), levels s = sigma/alpha: the grid runs from high to low.
        spacing: "log": uniform in ln s; "edm": uniform in s^(1/rho) (Karras et al. 2022, eq. 5);
            "time": uniform in t.
        rho: of "edm", > 0; None: 7. With another spacing it has to be None.

    Raises:
        TypeError, ValueError: An argument is wrong, or the schedule does not reach these levels;
            the message names the argument.
    """
    low, high = noise_range(noise)
    steps = check.integer("steps", steps, 1)
    check.choice("spacing", spacing, SPACINGS)
    if spacing != "edm":
        check.unused("rho", rho, f"with spacing={spacing!r}: spacing='edm' has it")
    rho = check.positive("rho", 7.0 if rho is None else rho)
    ends = torch.tensor([high, low], dtype=torch.float64, device="cpu")
    unit = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device="cpu")
    if spacing == "time":
        first, last = times_of(schedule, ends)
        t = first + unit * (last - first)
    else:
        power = ends.log() if spacing == "log" else ends ** (1 / rho)
        s = power[0] + unit * (power[1] - power[0])
        s = s.exp() if spacing == "log" else s**rho
        s[0], s[-1] = high, low
        t = times_of(schedule, s)
    nodes(schedule, t)
    return t


def times_of(schedule: Schedule, s: Tensor) -> Tensor:
    """The times of the levels s [M + 1] = sigma/alpha, which fall.

    Raises:
        ValueError: The schedule does not reach them; the message says what it does.
    """
    try:
        return schedule.t_of_log_snr(-2 * s.log())
    except ValueError as error:
        ends = torch.tensor(schedule.t_range, dtype=torch.float64, device="cpu")
        if not bool(ends.isfinite().all()):
            raise
        low, high = sorted((schedule.log_snr(ends) / -2).exp().tolist())
        wanted = f"levels in [{low:g}, {high:g}], which {schedule!r} reaches"
        came = f"({s[-1].item():g}, {s[0].item():g})"
        raise check.mismatch("noise", wanted, came) from error


def checked_times(t: Tensor) -> Tensor:
    """The times of nodes [M + 1], in float64 on the CPU.

    Raises:
        TypeError, ValueError: `t` is no tensor of real numbers of this shape.
    """
    check.tensor("t", t)
    if t.ndim != 1 or len(t) < 1 or t.is_complex() or t.dtype == torch.bool:
        raise ValueError(
            f"t: expected real numbers of shape [M + 1], got {t.dtype} {list(t.shape)}"
        )
    return t.detach().to("cpu", torch.float64)


def nodes(schedule: Schedule, t: Tensor) -> Nodes:
    """The levels at the times t [M + 1], noisiest first.

    Raises:
        TypeError, ValueError: `t` has another shape, sigma = 0 or alpha = 0 at a node (a solver
            divides by both), or noise sigma/alpha that does not strictly fall.
    """
    t = checked_times(t)
    alpha, sigma = schedule(t)
    for name, level in (("sigma", sigma), ("alpha", alpha)):
        if not bool((level > 0).all()):
            at = t[~(level > 0)][0].item()
            raise ValueError(
                f"t: expected {name} > 0 at every node, got {name} = 0 at t = {at:g} of "
                f"{schedule!r}; stop short of it, e.g. with "
                "time_grid(schedule, steps, noise=(0.002, 80))"
            )
    s = sigma / alpha
    if bool((s.diff() >= 0).any()):
        i = int((s.diff() >= 0).nonzero()[0])
        raise ValueError(
            "t: expected noise sigma/alpha that strictly falls from node to node, got "
            f"{s[i].item():g} at t = {t[i].item():g}, then {s[i + 1].item():g} at "
            f"t = {t[i + 1].item():g}"
        )
    return Nodes(t, alpha, sigma, s)
