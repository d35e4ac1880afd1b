"""Stein variational gradient descent, as what flows of other functionals are compared with."""

from __future__ import annotations

from ._kernel_sums import kernel_sums
from ._target import Function, Target
from .bandwidth import Bandwidth, bandwidth, checked
from .state import Particles
from .variation import Variation

__all__ = ["SVGD"]


class SVGD:
    """The direction of Stein variational gradient descent (Liu & Wang 2016),

        -G_i = sum_j w_j (k(x_j, x_i) s(x_j) + grad_1 k(x_j, x_i)),  k = exp(-|x - y|^2/h)

    It is no gradient of a first variation in each particle: use it with
    `Flow(SVGD(...), friction=None)`, which is the method as published, and without weights.

    Args:
        log_target: log-density up to a constant, ``[M, *E] -> [M]``, row by row. Used where
            grad_log_target is None.
        grad_log_target: The score s, ``[M, *E] -> [M, *E]``. None: by autograd.
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
        """Minus the direction, as the gradient."""
        given = particles._rows
        score, _ = self._target(particles.x)
        h = bandwidth(given, self.bandwidth)
        x = given - given.mean(0)
        values = score.reshape(x.shape) - (2 / h) * x
        total, sums = kernel_sums(x, values, particles.log_w, h)
        direction = sums + (2 / h) * total * x
        return Variation(-direction.reshape(particles.x.shape))
