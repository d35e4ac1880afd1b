"""Log-likelihoods of training and held-out points under the network's flow."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ..likelihood import Likelihood, log_prob
from ..traces import Hutchinson
from . import estimates
from .parts import Estimate, LikelihoodAudit
from .task import Points, Task

__all__ = ["PointLikelihoods", "compared", "measured"]

_STEPS = 24  # of Runge and Kutta's method of order 4


class PointLikelihoods(NamedTuple):
    """Of the points of one kind, per number: the log-likelihood of x/alpha in nats, and the
    estimated error of its integration.
    """

    nats: tuple[float, ...]
    errors: tuple[float, ...]


def measured(task: Task, part: int, cloud: Points) -> PointLikelihoods:
    """The likelihoods of points at the lowest level: each noisy, or spread over its bin where a
    width is given. Points of the other kind get the same noise and the same random probes.
    """
    rng, level = task.rng(part), task.levels[0]
    count = _count(task)
    noise = task.normal(rng, count)
    probes = task.generator(rng)
    shift = level.sigma / level.alpha * noise
    if task.width is not None:
        uniform = torch.rand(
            noise.shape, generator=rng.generator, dtype=torch.float64, device="cpu"
        )
        shift = task.width * (uniform - 0.5).to(noise.device)
    x = level.alpha * (rng.different(cloud, count) + shift)

    def both(x: Tensor) -> Tensor:
        found = _log_prob(task, x, probes)
        return torch.stack([-math.log(2) * found.bits_per_dim, found.error / task.reference.d], 1)

    nats, errors = task.in_batches(both, x.to(task.dtype)).double().cpu().unbind(1)
    return PointLikelihoods(tuple(nats.tolist()), tuple(errors.tolist()))


def compared(task: Task, found: dict[str, PointLikelihoods]) -> LikelihoodAudit | None:
    """The likelihoods of both kinds beside each other; None where there are no points."""
    if not found:
        return None
    count = _count(task)
    values = {
        kind: torch.tensor(one.nats, dtype=torch.float64, device="cpu")
        for kind, one in found.items()
    }
    nats = {kind: estimates.mean(one, count) for kind, one in values.items()}
    bits = {} if task.width is None else {k: _bits(one, task.width) for k, one in nats.items()}
    gap = estimates.mean(values["train"] - values["held_out"], count) if len(values) == 2 else None
    return LikelihoodAudit(
        task.noise,
        nats.get("train"),
        nats.get("held_out"),
        max(sum(one.errors) / count for one in found.values()),
        gap,
        count,
        task.width,
        bits.get("train"),
        bits.get("held_out"),
    )


def _count(task: Task) -> int:
    """As many points of either kind as there are of both."""
    return min(task.points, *(len(cloud) for cloud in task.clouds.values()))


def _log_prob(task: Task, x: Tensor, probes: torch.Generator) -> Likelihood:
    with warnings.catch_warnings(), torch.no_grad():
        # the error is in the report, and the verdict compares it with the others
        warnings.filterwarnings("ignore", "log_prob: the estimated error", RuntimeWarning)
        return log_prob(
            task.denoiser,
            x,
            task.noise,
            Hutchinson(probes),
            method="rk4",
            steps=_STEPS,
            data_std=task.std,
        )


def _bits(nats: Estimate, width: float) -> Estimate:
    """Bits per dimension: -log2(density per number) - log2(width)."""
    bit = math.log(2)
    return Estimate(-nats.value / bit - math.log2(width), nats.error / bit)
