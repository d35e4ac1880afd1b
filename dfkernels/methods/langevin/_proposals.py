"""Proposals x' ~ N(mean, covariance) of one Langevin step, on flat states [B, d].

Those that Metropolis can judge have a density: `log_density(x')`, [B] in float64, up to a constant
that is the same at every state of a chain. All their fields are [B, ...].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...linalg.function import function_product

__all__ = ["Isotropic", "Krylov", "Proposal", "RankOne", "Spectral", "of_spectrum"]


class Isotropic(NamedTuple):
    """Covariance variance I; the variance is that of every state."""

    mean: Tensor  # [B, d]
    variance: Tensor  # [B, 1]

    def draw(self, xi: Tensor) -> Tensor:
        """x' from standard normal noise [B, d]."""
        return self.mean + self.variance.sqrt() * xi

    def log_density(self, to: Tensor) -> Tensor:
        return -(to - self.mean).square().sum(1).double() / self.variance[:, 0] / 2


class RankOne(NamedTuple):
    """Covariance variance (I + c u u^T), c >= 0; the variance is that of every state."""

    mean: Tensor  # [B, d]
    variance: Tensor  # [B, 1]
    u: Tensor  # [B, d]
    c: Tensor  # [B, 1]

    @property
    def _square(self) -> Tensor:
        return self.u.square().sum(1, keepdim=True)

    def draw(self, xi: Tensor) -> Tensor:
        """By the square root, I + ((sqrt(1 + c |u|^2) - 1)/|u|^2) u u^T."""
        along = self.c / ((1 + self.c * self._square).sqrt() + 1)  # with no difference, nor 0/0
        xi = xi + along * (self.u * xi).sum(1, keepdim=True) * self.u
        return self.mean + self.variance.sqrt() * xi

    def log_density(self, to: Tensor) -> Tensor:
        off, stretch = to - self.mean, 1 + self.c * self._square
        along = (self.u * off).sum(1, keepdim=True)
        square = off.square().sum(1, keepdim=True) - self.c * along.square() / stretch
        return -(square.double() / self.variance + stretch.double().log())[:, 0] / 2


class Spectral(NamedTuple):
    """Covariance V diag(variances) V^T."""

    mean: Tensor  # [B, d]
    variances: Tensor  # [B, d]
    vectors: Tensor  # V [B, d, d], in columns

    def draw(self, xi: Tensor) -> Tensor:
        """By the symmetric square root, so that the signs of eigenvectors do not matter."""
        return self.mean + of_spectrum(self.vectors, self.variances.sqrt(), xi)

    def log_density(self, to: Tensor) -> Tensor:
        along = ((to - self.mean)[:, None] @ self.vectors)[:, 0]
        square = (along.square() / self.variances).sum(1)
        return -(square.double() + self.variances.double().log().sum(1)) / 2


class Krylov(NamedTuple):
    """x' = x + h M(S) drift + sqrt(2 h M(S)) sigma xi by Lanczos, where S is known by its products
    only."""

    x: Tensor  # [B, d]
    apply: Callable[[Tensor], Tensor]  # v -> S v
    factor: Callable[[Tensor], Tensor]  # M as a function of the eigenvalues of S
    drift: Tensor  # [B, d]
    step_size: float  # h
    sigma: Tensor  # [B, 1]
    lanczos: int

    def draw(self, xi: Tensor) -> Tensor:
        def both(values: Tensor) -> Tensor:
            m = self.factor(values)
            return torch.stack([m[:, 0], m[:, 1].sqrt()], 1)

        pair = torch.stack([self.drift, xi], 1)
        drift, noise = function_product(self.apply, pair, both, self.lanczos).unbind(1)
        return self.x + self.step_size * drift + (2 * self.step_size) ** 0.5 * self.sigma * noise


Proposal = Isotropic | RankOne | Spectral


def of_spectrum(vectors: Tensor, values: Tensor, v: Tensor) -> Tensor:
    """V diag(values) V^T v for v [B, d]."""
    return (vectors @ (values[..., None] * (vectors.mT @ v[..., None])))[..., 0]
