"""The runs behind the tables of the particle flows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dfkernels.methods.particles import (
    KL,
    KSD,
    SVGD,
    Evolution,
    Flow,
    Kalman,
    Metric,
    Particles,
    Stein,
    Variation,
    Wasserstein,
    evolve,
)

from .particles_laws import Distance, Law, distance, single, wasserstein

Functional = Callable[[Particles], Variation]

TAU, FRICTION = 0.12, 0.7  # with velocities
FIRST_ORDER = {"single": 0.015, "ten": 0.01, "plane": 0.01}  # the step without


@dataclass(frozen=True)
class Size:
    """How much is computed: particles, draws that W2 is measured against, steps at which it is,
    steps of the slow flows, starts."""

    M: int
    draws: int
    steps: tuple[int, ...]
    slow: int
    seeds: int


FULL = Size(128, 5000, (25, 50, 100, 200, 400), 3000, 5)
QUICK = Size(24, 200, (3, 6), 12, 2)


@dataclass(frozen=True)
class Ending:
    """Where a flow ended, and how far that is from the law."""

    particles: Particles
    distance: Distance


def flow(
    law: Law,
    rate: float | None,
    tau: float = TAU,
    friction: float | None = FRICTION,
    weights: str | None = "continuous",
    functional: Functional | None = None,
    metric: Metric | None = None,
) -> Flow:
    """With velocities, of KL in the smoothing "blob", unless something else is given; rate None: no
    weights."""
    return Flow(
        functional or KL(law.log_density),
        tau,
        friction,
        metric or Wasserstein(),
        weights if rate else None,
        rate or None,
    )


def ended(law: Law, what: Flow, steps: int, size: Size, seed: int = 0) -> Evolution:
    generator = torch.Generator().manual_seed(seed)
    return evolve(what, law.particles(size.M, seed), steps, generator=generator)


def measured(law: Law, what: Flow, steps: int, size: Size) -> Ending:
    p = ended(law, what, steps, size).particles
    return Ending(p, distance(law, p, reference(law, size)))


def reference(law: Law, size: Size) -> Tensor:
    return law.draws(size.draws, 1)


def floor(law: Law, size: Size) -> Distance:
    """Of as many independent draws of the law, the mean over three sets."""
    y = reference(law, size)
    sets = [distance(law, Particles(law.draws(size.M, seed)), y) for seed in (2, 3, 4)]
    each = zip(*(vars(s).values() for s in sets), strict=True)
    return Distance(*(sum(values) / len(sets) for values in each))


def curves(size: Size) -> dict[str, list[float]]:
    """W2 of the single Gaussian after each of the steps."""
    law = single()
    flows = {
        "gradient flow, τ = .015": flow(law, None, 0.015, friction=None),
        "accelerated, τ = .12": flow(law, None),
        "accelerated, τ = .3": flow(law, None, 0.3),
        "accelerated, Kalman, τ = .12": flow(law, None, metric=Kalman()),
        "SVGD, τ = .3": flow(law, None, 0.3, functional=SVGD(law.log_density), friction=None),
    }
    y, found = reference(law, size), {}
    for name, what in flows.items():
        p, done, found[name] = law.particles(size.M, 0), 0, []
        for steps in size.steps:
            p, done = evolve(what, p, steps - done).particles, steps
            found[name].append(wasserstein(p.x, p.weights, y))
    return found


def other_draws(size: Size) -> list[float]:
    """W2 of the gradient flow's first cell in `curves`, against other draws of the law."""
    law = single()
    p = ended(law, flow(law, None, 0.015, friction=None), size.steps[0], size).particles
    return [wasserstein(p.x, p.weights, law.draws(size.draws, seed)) for seed in (11, 12, 13)]


def functionals_and_metrics(size: Size) -> dict[str, Ending]:
    """Ends of the single Gaussian."""
    law, last = single(), size.steps[-1]
    kl, slow = law.log_density, size.slow // 3
    flows = {
        "KL, gfsd": (flow(law, None, functional=KL(kl, smoothing="gfsd")), last),
        "KL, blob": (flow(law, None), last),
        "KL, blob, weights, a = .2": (flow(law, 0.2), last),
        "KL, blob, Kalman": (flow(law, None, metric=Kalman()), last),
        "KL, blob, Stein": (flow(law, None, 0.3, metric=Stein()), last),
        "KSD, h = 8": (flow(law, None, 0.1, None, functional=KSD(kl, bandwidth=8.0)), slow),
        "SVGD": (flow(law, None, 0.3, None, functional=SVGD(kl)), slow),
    }  # fmt: skip
    return {name: measured(law, what, steps, size) for name, (what, steps) in flows.items()}


def weights(name: str, law: Law, size: Size) -> dict[tuple[str, str], Ending]:
    """Ends by dynamics and by what the weights do."""
    kinds = {
        "none": (None, None),
        "continuous, a = .2": (0.2, "continuous"),
        "continuous, a = 1": (1.0, "continuous"),
        "duplicate-kill, a = .2": (0.2, "duplicate-kill"),
    }
    found = {}
    for kind, (rate, what) in kinds.items():
        slow = flow(law, rate, FIRST_ORDER[name], None, what)
        found["gradient", kind] = measured(law, slow, size.slow, size)
    for kind, (rate, what) in kinds.items():
        fast = flow(law, rate, weights=what)
        found["accelerated", kind] = measured(law, fast, size.steps[-1], size)
    return found


def masses(law: Law, size: Size) -> dict[str, Tensor]:
    """Mass of the first mode after the accelerated flow, for each of several starts."""
    kinds = {
        "none": flow(law, None),
        "continuous, a = .2": flow(law, 0.2),
        "duplicate-kill, a = .2": flow(law, 0.2, weights="duplicate-kill"),
    }
    return {
        kind: torch.tensor(
            [
                law.mass(ended(law, what, size.steps[-1], size, seed).particles)
                for seed in range(size.seeds)
            ],
            dtype=torch.float64,
        )
        for kind, what in kinds.items()
    }
