"""A flow of particles, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..._torch import check
from ..._torch.objects import plain
from ._weights import copied, reweighted
from .metrics import Metric, Wasserstein
from .state import Particles
from .variation import Variation

__all__ = ["Flow"]

WEIGHTS = ("continuous", "duplicate-kill", None)


@dataclass(frozen=True)
class Flow:
    """How particles move and what becomes of their weights, for `step` and `evolve`.

    A step of size tau, from x_k: v <- (1 - gamma tau) v - tau (kinetic gradient + G), then x <- x +
    tau A v with the new v, and the weights by Phi at x_k.

    Args:
        functional: What is lowered: `KL`, `KSD`, `SinkhornDivergence`, `SVGD`, or any function of
            `Particles` that returns a `Variation`.
        step_size: tau > 0. For `KL` with velocities some tenths of the smallest standard deviation
            of the target, without them some tenths of its square.
        friction: gamma, from 0 to 1/step_size; the relaxation takes a time of about 1/gamma at
            least. None: no velocities, the gradient flow x <- x - tau A G.
        metric: `Wasserstein`, `Kalman` or `Stein`, or a `Metric` of your own.
        weights: What moves mass between particles that cannot meet, such as those of two modes:
            "continuous", weights by the exact exponential w_i exp(-a tau Phi_i); "duplicate-kill",
            copies in their place: particles of equal weights, resampled from these weights at
            random (systematic resampling); None: nothing, weights stay.
        weight_rate: a > 0, how fast mass moves beside positions; 0.2 to 1. None: 0.2. With
            weights=None it has to be None.
        copy_noise: The standard deviation of what is added to a copy, so that it leaves its
            original, in the unit of x. None: that of a Langevin step of the same size, sqrt(2 tau)
            without velocities and sqrt(2) tau with. Without "duplicate-kill" it has to be
            None.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """

    functional: Callable[[Particles], Variation]
    step_size: float
    friction: float | None = 0.7
    metric: Metric = field(default_factory=Wasserstein)
    weights: str | None = "continuous"
    weight_rate: float | None = None
    copy_noise: float | None = None

    def __post_init__(self) -> None:
        check.function("functional", self.functional, "a function of Particles")
        if not isinstance(self.metric, Metric):
            raise TypeError(
                "metric: expected Wasserstein(), Kalman() or Stein(), got "
                f"{getattr(self.metric, '__name__', type(self.metric).__name__)}"
            )
        check.choice("weights", self.weights, WEIGHTS)
        if self.weights is None:
            check.unused("weight_rate", self.weight_rate, "with weights=None, which moves no mass")
        if self.weights != "duplicate-kill":
            where = f"with weights={self.weights!r}: weights='duplicate-kill' makes copies"
            check.unused("copy_noise", self.copy_noise, where)
        object.__setattr__(self, "step_size", check.positive("step_size", self.step_size))
        if self.weight_rate is not None:
            rate = check.positive("weight_rate", self.weight_rate)
            object.__setattr__(self, "weight_rate", rate)
        if self.friction is not None:
            friction, most = check.constant("friction", self.friction), 1 / self.step_size
            if not 0 <= friction <= most:
                raise check.mismatch(
                    "friction", f"None or a value from 0 to 1/step_size = {most:g}", friction
                )
            object.__setattr__(self, "friction", friction)
        if self.copy_noise is not None:
            object.__setattr__(self, "copy_noise", check.nonnegative("copy_noise", self.copy_noise))

    def step(self, particles: Particles, generator: torch.Generator | None = None) -> Particles:
        """One step.

        Args:
            particles: Where they are.
            generator: For "duplicate-kill", else unused.

        Returns:
            Where they go; without a graph.

        Raises:
            TypeError: An argument is wrong, or the functional returns something else; the message
                names it.
            ValueError: So for a value; or particles leave the range of finite numbers: step_size
                is too large.
        """
        self._check(particles, generator)
        with torch.no_grad(), plain(particles.x.device):
            return self._moved(particles, self._variation(particles), generator)

    def _check(self, particles: Particles, generator: torch.Generator | None) -> None:
        check.instance("particles", particles, Particles, "Particles")
        if self.weights == "duplicate-kill" and not isinstance(generator, torch.Generator):
            raise TypeError(
                "generator: expected a torch.Generator for weights='duplicate-kill', got "
                f"{type(generator).__name__}"
            )

    def _variation(self, particles: Particles) -> Variation:
        found = self.functional(particles)
        check.instance("functional", found, Variation, "it to return a Variation")
        check.like("functional: gradient", found.gradient, "x", particles.x)
        if found.value is None and self.weights is not None:
            raise check.mismatch(
                "weights",
                "None for a functional without a first variation (KL without log_target, SVGD)",
                repr(self.weights),
            )
        if found.value is not None:
            check.like("functional: value", found.value, "log_w", particles.log_w)
        return found

    def _moved(
        self, particles: Particles, found: Variation, generator: torch.Generator | None
    ) -> Particles:
        """The particles one step on, from the variation where they are."""
        tau, v, log_w = self.step_size, particles.v, particles.log_w
        if self.friction is None:
            x = particles.x - tau * self.metric.position_rate(particles, found.gradient)
        else:
            force = self.metric.kinetic_gradient(particles) + found.gradient
            v = (1 - self.friction * tau) * v - tau * force
            x = particles.x + tau * self.metric.position_rate(particles, v)
        if self.weights is not None:
            assert found.value is not None
            rate = 0.2 if self.weight_rate is None else self.weight_rate
            log_w = reweighted(log_w, found.value, rate * tau)
        if self.weights == "duplicate-kill":
            assert generator is not None
            origin, copy = copied(log_w, generator)
            how = {"generator": generator, "dtype": x.dtype, "device": generator.device}
            noise = torch.randn((int(copy.sum()), *x.shape[1:]), **how).to(x.device)
            x, v, log_w = x[origin], v[origin], torch.full_like(log_w, -math.log(len(x)))
            x[copy] += self._noise() * noise
        _finite(x, log_w, self.step_size)
        return Particles._of(x, log_w, v)

    def _noise(self) -> float:
        if self.copy_noise is not None:
            return self.copy_noise
        tau = self.step_size
        return math.sqrt(2) * (math.sqrt(tau) if self.friction is None else tau)


def _finite(x: Tensor, log_w: Tensor, step_size: float) -> None:
    moved = x.isfinite().reshape(len(x), -1).all(1) & ~log_w.isnan()
    if not bool(moved.all()):
        raise check.mismatch(
            "step_size",
            "one at which the flow is stable",
            f"{step_size:g}, at which particle {int((~moved).nonzero()[0])} is no longer finite",
        )
