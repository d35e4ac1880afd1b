"""The measurements at one noise level: errors of the network and of the exact posterior mean, and
what the network's Jacobian says of the posterior variance.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..._torch.shapes import flat
from ...fisher import DiffusionFisher
from ..convention.queries import Rng
from . import estimates, jacobian
from .levels import Level
from .parts import Calibration, Errors, Estimate, LevelAudit
from .task import Points, Task
from .thresholds import CLEAR

__all__ = ["measured"]


class _Answers(NamedTuple):
    """Noisy points of one kind, and per query [Q], in float64 on the CPU, what was found there."""

    x: Tensor  # [Q, *E]
    network: Tensor  # mean square error
    linear: Tensor  # of a multiple of x
    exact: Tensor | None
    distance: Tensor | None  # mean square
    trace: Tensor | None  # sigma^2 tr F/d of the training data
    ess: Tensor | None


def measured(task: Task, part: int, level: Level) -> LevelAudit:
    """Everything about one level. Both kinds of data get the same noise."""
    rng = task.rng(part)
    noise = task.normal(rng, task.groups * task.repeats)
    found = {kind: _answers(task, cloud, level, noise, rng) for kind, cloud in task.clouds.items()}
    train, held_out = found.get("train"), found.get("held_out")
    at = held_out or train
    assert at is not None  # one of the two is always given
    trace, jacobian_audit = jacobian.measured(task, level, at.x, at.trace, rng)
    variance = (level.sigma / level.alpha) ** 2
    return LevelAudit(
        *level,
        baseline=variance * task.std**2 / (variance + task.std**2),
        train=None if train is None else _errors(task, train),
        held_out=None if held_out is None else _errors(task, held_out),
        best=_best(task, train, variance),
        **_gaps(task, train, held_out),
        jacobian=jacobian_audit,
        calibration=_calibration(task, variance * (1 - trace), at.network),
    )


def _answers(task: Task, cloud: Points, level: Level, noise: Tensor, rng: Rng) -> _Answers:
    y = rng.different(cloud, task.groups).repeat_interleave(task.repeats, 0)
    x = (level.alpha * y + level.sigma * noise).to(task.dtype)
    mean = task.in_batches(lambda x: task.denoiser(x, level.t), x)
    square = lambda a, b: flat(a.double() - b.double()).square().mean(1).cpu()
    network, linear = square(mean, y), square(_linear(task, x.double() / level.alpha, level), y)
    if task.train is None:
        return _Answers(x, network, linear, None, None, None, None)
    fisher = DiffusionFisher(x, task.train, level.alpha, level.sigma)
    exact, trace = fisher.denoised, level.sigma**2 * fisher.trace().double() / task.train.d
    return _Answers(
        *(x, network, linear, square(exact, y), square(mean, exact)),
        *(trace.cpu(), fisher.ess.double().cpu()),
    )


def _linear(task: Task, x: Tensor, level: Level) -> Tensor:
    """The best prediction of x_0 from x/alpha with one factor for all numbers."""
    variance = (level.sigma / level.alpha) ** 2
    return task.mean + task.std**2 / (task.std**2 + variance) * (x - task.mean)


def _errors(task: Task, found: _Answers) -> Errors:
    mean = lambda values: None if values is None else estimates.mean(values, task.groups)
    return Errors(
        estimates.mean(found.network, task.groups),
        mean(found.exact),
        None if found.exact is None else mean(found.network - found.exact),
        mean(found.distance),
        None if found.ess is None else found.ess.median().item(),
    )


def _best(task: Task, train: _Answers | None, variance: float) -> Estimate | None:
    """The posterior variance, which the exact mean's error has as its mean."""
    if train is None or train.trace is None:
        return None
    return estimates.mean(variance * (1 - train.trace).clamp_min(0), task.groups)


def _gaps(
    task: Task, train: _Answers | None, held_out: _Answers | None
) -> dict[str, Estimate | None]:
    if train is None or held_out is None or train.exact is None or held_out.exact is None:
        return dict.fromkeys(("gap", "exact_gap", "linear_gap", "memorised"))
    linear = held_out.linear - train.linear
    network, exact = (
        estimates.without_chance(values, linear, task.groups)
        for values in (held_out.network - train.network, held_out.exact - train.exact)
    )
    gap, exact_gap, linear_gap = (
        estimates.mean(values, task.groups) for values in (network, exact, linear)
    )
    clear = exact_gap.value > CLEAR * exact_gap.error
    memorised = estimates.ratio(network, exact, task.groups) if clear else None
    return {
        "gap": gap,
        "exact_gap": exact_gap,
        "linear_gap": linear_gap,
        "memorised": memorised,
    }


def _calibration(task: Task, predicted: Tensor, actual: Tensor) -> Calibration:
    return Calibration(
        estimates.mean(predicted, task.groups),
        estimates.mean(actual, task.groups),
        estimates.ratio(predicted, actual, task.groups),
    )
