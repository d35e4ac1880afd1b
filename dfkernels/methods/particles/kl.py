"""KL(mu | target) of particles whose law is smoothed by a kernel."""

from __future__ import annotations

import math

from torch import Tensor

from ... import ops
from ..._torch import check
from ._target import Function, Target
from .bandwidth import Bandwidth, bandwidth, checked
from .state import Particles
from .variation import Variation

__all__ = ["KL"]

SMOOTHINGS = ("blob", "gfsd")


class KL:
    """The Kullback-Leibler divergence of the particles' law from a target.

    With the smoothed density q_i = sum_j w_j k(x_i, x_j), k a Gaussian of squared width h/2, and
    U = -log_target,

        "blob"   Phi_i = U_i + log q_i + sum_j w_j k_ij/q_j, of F = sum_i w_i (U_i + log q_i)
        "gfsd"   Phi_i = U_i + log q_i, of no known F

    "blob" is the gradient of a functional, which a small step lowers, at fixed bandwidth; "gfsd"
    takes one pass over the pairs in place of two, and underestimates variances more.

    Args:
        log_target: log-density of the target up to a constant, ``[M, *E] -> [M]``, row by row.
            None: only the score is known, and there are neither weights nor an energy.
        grad_log_target: Its gradient, the score, ``[M, *E] -> [M, *E]``. None: by autograd.
        smoothing: "blob" or "gfsd".
        bandwidth: h, a number or a rule of `bandwidth`, applied at every step.

    Raises:
        TypeError, ValueError: An argument is wrong, or what a function returns; the message names
            it.
    """

    def __init__(
        self,
        log_target: Function | None = None,
        grad_log_target: Function | None = None,
        *,
        smoothing: str = "blob",
        bandwidth: Bandwidth = "nearest",
    ) -> None:
        check.choice("smoothing", smoothing, SMOOTHINGS)
        self._target = Target(log_target, grad_log_target)
        self.smoothing, self.bandwidth = smoothing, checked("bandwidth", bandwidth)

    def __call__(self, particles: Particles) -> Variation:
        """The first variation, its gradient, and F up to the target's constant ("blob")."""
        x, log_w = particles._rows, particles.log_w
        score, log_target = self._target(particles.x)
        sigma = math.sqrt(bandwidth(x, self.bandwidth) / 2)
        smoothed = ops.posterior(x, x, 1.0, sigma, log_w)
        log_q = smoothed.log_prob
        gradient = smoothed.score(x, 1.0, sigma) - score.reshape(x.shape)
        value = None if log_target is None else log_q - log_target
        energy = math.nan
        if self.smoothing == "blob":
            if value is not None:
                energy = _mean(particles.weights, value)
            prior = log_w - log_q
            second = ops.posterior(x, x, 1.0, sigma, prior)
            ratio = (second.log_prob + prior.logsumexp(0)).exp()  # sum_j w_j k_ij/q_j
            gradient = gradient + ratio[:, None] * second.score(x, 1.0, sigma)
            value = None if value is None else value + ratio
        return Variation(gradient.reshape(particles.x.shape), value, energy)


def _mean(weights: Tensor, values: Tensor) -> float:
    return float(weights.double() @ values.double())
