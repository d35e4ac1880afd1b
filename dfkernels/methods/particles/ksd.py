"""Kernel Stein discrepancy of particles from a target that is known by its score."""

from __future__ import annotations

import torch

from ..._torch.objects import plain
from ._pairs import rows_of
from ._target import Function, Target
from .bandwidth import Bandwidth, bandwidth, checked
from .state import Particles
from .variation import Variation

__all__ = ["KSD"]


class KSD:
    """Half the squared kernel Stein discrepancy of the particles' law from a target: F =
    sum_ij w_i w_j k_stein(x_i, x_j)/2, whose descent is KSDD. It needs no density of the particles.

    With the score s, d dimensions, delta = x_i - x_j and k = exp(-|delta|^2/h),

        k_stein = k (<s_i, s_j> + (2/h) <s_i - s_j, delta> + 2d/h - 4 |delta|^2/h^2)

    Its gradient takes the derivative of the score once, in reverse mode. Particles may come to rest
    at other stationary points of the score than modes: start them near the target.

    Args:
        log_target: log-density up to a constant, ``[M, *E] -> [M]``, row by row; twice
            differentiable. Used where grad_log_target is None.
        grad_log_target: The score, ``[M, *E] -> [M, *E]``, which autograd can differentiate. None:
            by autograd.
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
        bandwidth: Bandwidth = "median",
    ) -> None:
        self._target = Target(log_target, grad_log_target)
        self.bandwidth = checked("bandwidth", bandwidth)

    def __call__(self, particles: Particles) -> Variation:
        """The first variation sum_j w_j k_stein(x_i, x_j), its gradient, and F."""
        with plain(particles.x.device):
            return self._variation(particles)

    def _variation(self, particles: Particles) -> Variation:
        given, weights = particles._rows, particles.weights
        score, pullback = self._target.score_and_pullback(particles.x)
        h, s = bandwidth(given, self.bandwidth), score.reshape(given.shape)
        x = given - given.mean(0)
        s_x = (s * x).sum(1)
        value, gradient, cotangent = x.new_empty(len(x)), torch.empty_like(x), torch.empty_like(x)
        for rows, kernel, square in rows_of(x, weights, h):
            x_i, s_i = x[rows], s[rows]
            turn = s_x[rows, None] - s_i @ x.T - x_i @ s.T + s_x
            factor = s_i @ s.T + (2 / h) * turn + (2 * x.shape[1] / h) - (4 / h**2) * square
            pairs = kernel * factor
            value[rows] = pairs.sum(1)
            away = kernel.sum(1, True) * x_i - kernel @ x  # sum_j w_j k_ij delta
            s_j = kernel @ s
            cotangent[rows] = s_j + (2 / h) * away
            own = kernel.sum(1, True) * s_i - s_j - (4 / h) * away
            own = own - (value[rows, None] * x_i - pairs @ x)
            gradient[rows] = (2 / h) * own
        gradient += pullback(cotangent.reshape(particles.x.shape)).reshape(x.shape)
        energy = float(weights.double() @ value.double()) / 2
        return Variation(gradient.reshape(particles.x.shape), value, energy)
