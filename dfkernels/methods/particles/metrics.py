"""Metrics on the laws: how velocities move the particles.

Each has a kinetic energy T = sum_i w_i <v_i, (A v)_i>/2, and the equations of motion are
Hamilton's, dx_i/dt = (A v)_i and dv_i/dt = -(1/w_i) dT/dx_i - G_i: with constant weights and
without friction, T + F is conserved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..._torch import check
from ..._torch.objects import plain
from ._kernel_sums import kernel_sums
from ._pairs import rows_of
from .bandwidth import Bandwidth, bandwidth, checked
from .state import Particles

__all__ = ["Kalman", "Metric", "Stein", "Wasserstein"]


class Metric:
    """What `Flow` takes as a metric: to make one of your own, define both rates of one kinetic
    energy T."""

    def position_rate(self, particles: Particles, v: Tensor) -> Tensor:
        """A v ``[M, *E]``, dx/dt of particles with velocities v ``[M, *E]``."""
        raise NotImplementedError(f"{type(self).__name__}: define position_rate")

    def kinetic_gradient(self, particles: Particles) -> Tensor:
        """(1/w_i) dT/dx_i ``[M, *E]`` at the particles' own velocities."""
        raise NotImplementedError(f"{type(self).__name__}: define kinetic_gradient")


@dataclass(frozen=True)
class Wasserstein(Metric):
    """A v = v: each particle moves with its velocity, as in optimal transport."""

    def position_rate(self, particles: Particles, v: Tensor) -> Tensor:
        """v."""
        return v

    def kinetic_gradient(self, particles: Particles) -> Tensor:
        """Zero."""
        return torch.zeros_like(particles.x)


@dataclass(frozen=True)
class Kalman(Metric):
    """A v_i = C v_i with the weighted covariance C of the particles, the Kalman-Wasserstein metric:
    directions in which the particles spread are moved faster, so that the shape of a Gaussian
    target does not matter.

    Args:
        ridge: lambda >= 0, added to C as lambda I. With 0 particles stay in the affine space that
            they span: with M <= d, or one particle, give one.

    Raises:
        TypeError, ValueError: ridge is no such number.
    """

    ridge: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "ridge", check.nonnegative("ridge", self.ridge))

    def position_rate(self, particles: Particles, v: Tensor) -> Tensor:
        """C v + lambda v; by the smaller of the two Gram matrices, [d, d] or [M, M]."""
        with plain(particles.x.device):
            x, w = _about_mean(particles)
            rows = v.reshape(x.shape)
            weighted = w[:, None] * x
            fewer = x.shape[1] <= len(x)
            found = rows @ (weighted.T @ x) if fewer else (rows @ weighted.T) @ x
            return (found + self.ridge * rows).reshape(v.shape)

    def kinetic_gradient(self, particles: Particles) -> Tensor:
        """B (x_i - m), B = sum_j w_j v_j v_j^T, m the weighted mean."""
        with plain(particles.x.device):
            x, w = _about_mean(particles)
            v = particles.v.reshape(x.shape)
            weighted = w[:, None] * v
            fewer = x.shape[1] <= len(x)
            found = x @ (weighted.T @ v) if fewer else (x @ weighted.T) @ v
            return found.reshape(particles.x.shape)


@dataclass(frozen=True)
class Stein(Metric):
    """A v_i = sum_j w_j k(x_i, x_j) v_j with k = exp(-|x - y|^2/h): neighbours move together.

    Args:
        bandwidth: h, a number or a rule of `bandwidth`, applied at every step.

    Raises:
        TypeError, ValueError: bandwidth is neither.
    """

    bandwidth: Bandwidth = "median"

    def __post_init__(self) -> None:
        object.__setattr__(self, "bandwidth", checked("bandwidth", self.bandwidth))

    def position_rate(self, particles: Particles, v: Tensor) -> Tensor:
        """sum_j w_j k_ij v_j, one pass of `ops.average`."""
        x = particles._rows
        h = bandwidth(x, self.bandwidth)
        return kernel_sums(x, v.reshape(x.shape), particles.log_w, h)[1].reshape(v.shape)

    def kinetic_gradient(self, particles: Particles) -> Tensor:
        """sum_j w_j <v_i, v_j> grad_1 k(x_i, x_j)."""
        with plain(particles.x.device):
            given = particles._rows
            h = bandwidth(given, self.bandwidth)
            x, v = given - given.mean(0), particles.v.reshape(given.shape)
            out = torch.empty_like(x)
            for rows, kernel, _ in rows_of(x, particles.weights, h):
                pairs = kernel * (v[rows] @ v.T)
                out[rows] = (-2 / h) * (pairs.sum(1, True) * x[rows] - pairs @ x)
            return out.reshape(particles.x.shape)


def _about_mean(particles: Particles) -> tuple[Tensor, Tensor]:
    x, w = particles._rows, particles.weights
    return x - w @ x, w
