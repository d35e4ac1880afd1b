"""Sinkhorn divergence of particles from draws of a target."""

from __future__ import annotations

from torch import Tensor

from ..._torch import check
from .. import sinkhorn
from .state import Particles
from .variation import Variation

__all__ = ["SinkhornDivergence"]


class SinkhornDivergence:
    """F = S(mu, nu), the debiased entropic transport cost between the particles and draws of the
    target: for a law that is known by samples alone.

    Phi = f - f' and G = T' - T, with f and T the potential and the map (`Coupling`) from the
    particles to the draws, f' and T' those from the particles to themselves. Without velocities a
    step_size of 1 moves every particle to where its mass goes.

    Each call starts from the couplings of the last one: to repeat a run bit by bit, make a new one.

    Args:
        y: Draws ``[m, *E]``, in the dtype of the particles.
        blur: sqrt(eps) > 0, as in `sinkhorn.divergence`.
        b: Weights of y, [m]. None: equal ones.
        tol: The marginal error at which the solvers stop.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it. Those of y, blur and b
            are looked at in the first call.
    """

    def __init__(
        self, y: Tensor, blur: float, b: Tensor | None = None, *, tol: float = 1e-4
    ) -> None:
        self.y, self.blur, self.b, self.tol = y, check.positive("blur", blur), b, tol
        self._last: sinkhorn.Divergence | None = None

    def __call__(self, particles: Particles) -> Variation:
        """The first variation, its gradient, and the divergence."""
        x, last = particles.x, self._last
        if last is not None and len(last.xx.f) != len(x):
            last = None
        weights = particles.log_w.double().exp()  # which has room for small ones
        self._last = found = sinkhorn.divergence(
            x, self.y, self.blur, weights, self.b, tol=self.tol, start=last
        )
        gradient = found.xx.barycentric_map() - found.xy.barycentric_map()
        value = found.xy.f - (found.xx.f + found.xx.g) / 2
        return Variation(gradient, value, float(found.value))
