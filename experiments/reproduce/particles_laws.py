"""Targets of the particle flows, and how far particles are from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.optimize import minimize
from torch import Tensor

import dfkernels as df
from dfkernels.methods.particles import Particles

F64 = torch.float64


@dataclass(frozen=True)
class Law:
    """A mixture of Gaussians with one covariance: log-density, draws, moments."""

    means: Tensor  # [K, d]
    shares: Tensor  # [K]
    covariance: Tensor  # of each, [d, d]
    start: float  # standard deviation of the particles at the start, about the origin

    @property
    def d(self) -> int:
        return self.means.shape[1]

    def log_density(self, x: Tensor) -> Tensor:
        """Up to a constant, [M]."""
        root = torch.linalg.cholesky(torch.linalg.inv(self.covariance))
        z = (x[:, None] - self.means) @ root
        return (self.shares.log() - z.square().sum(2) / 2).logsumexp(1)

    def draws(self, n: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        mode = torch.multinomial(self.shares, n, True, generator=generator)
        noise = torch.randn(n, self.d, dtype=F64, generator=generator)
        return self.means[mode] + noise @ torch.linalg.cholesky(self.covariance).T

    def particles(self, M: int, seed: int) -> Particles:
        generator = torch.Generator().manual_seed(seed)
        return Particles(self.start * torch.randn(M, self.d, dtype=F64, generator=generator))

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [d] and covariance [d, d]."""
        mean = self.shares @ self.means
        off = self.means - mean
        return mean, self.covariance + (self.shares[:, None] * off).T @ off

    def mass(self, p: Particles) -> float:
        """What the particles have on the side of the first mode."""
        side = (p.x - self.means.mean(0)) @ (self.means[0] - self.means[-1]) > 0
        return float(p.weights[side].sum())


def single() -> Law:
    """d = 10, variances 1, all correlations .8: condition number 41."""
    covariance = torch.full((10, 10), 0.8, dtype=F64).fill_diagonal_(1)
    one = torch.ones(1, dtype=F64)
    return Law(torch.zeros(1, 10, dtype=F64), one, covariance, 0.5)


def modes_in_ten() -> Law:
    """2/3 N(1.2 1, I) + 1/3 N(-1.2 1, I), d = 10."""
    shares = torch.tensor([2 / 3, 1 / 3], dtype=F64)
    means = 1.2 * torch.ones(2, 10, dtype=F64) * torch.tensor([[1.0], [-1.0]], dtype=F64)
    return Law(means, shares, torch.eye(10, dtype=F64), 1.0)


def modes_in_the_plane() -> Law:
    """.75 N((3, 0), I) + .25 N((-3, 0), I)."""
    means = torch.tensor([[3.0, 0.0], [-3.0, 0.0]], dtype=F64)
    return Law(means, torch.tensor([0.75, 0.25], dtype=F64), torch.eye(2, dtype=F64), 1.0)


@dataclass(frozen=True)
class Distance:
    """How far particles are from a law: W2 to draws of it, root mean square error of the mean,
    trace of the covariance over the true one, mass of the first mode, and the weights' ESS."""

    w2: float
    mean: float
    trace: float
    mass: float
    ess: float


def distance(law: Law, p: Particles, y: Tensor) -> Distance:
    """y: draws of the law."""
    mean, covariance = law.moments
    found = p.weights @ p.x
    spread = float(p.weights @ (p.x - found).square().sum(1))
    return Distance(
        wasserstein(p.x, p.weights, y),
        float((found - mean).square().mean().sqrt()),
        spread / float(covariance.trace()),
        law.mass(p),
        p.ess,
    )


def wasserstein(x: Tensor, weights: Tensor, y: Tensor) -> float:
    """W2 between weighted points x [M, d] and equal ones y [m, d], by the dual of the problem,

        W2^2 = max_g sum_i w_i g_i + mean_j min_i (|x_i - y_j|^2 - g_i),

    maximised with a soft minimum in place of the hard one, and then evaluated with the hard one:
    what comes out is a lower bound for any g. It was 1e-4 and less below POT's exact value, for
    particles of the single Gaussian and of the modes in the plane.
    """
    x, y, weights = x.double(), y.double(), weights.double() / weights.double().sum()
    costs = torch.cdist(x, y).square()
    g, nearest = x.new_zeros(len(x)), float(costs.amin(0).mean())
    for part in (0.1, 0.03):
        eps = part * nearest + 1e-12
        found = minimize(
            _negative_dual,
            g.numpy(),
            (x, y, weights, eps),
            "L-BFGS-B",
            True,
            options={"maxiter": 60},
        )
        g = torch.from_numpy(found.x)
    return math.sqrt(max(0.0, float(weights @ g + (costs - g[:, None]).amin(0).mean())))


def _negative_dual(g, x: Tensor, y: Tensor, weights: Tensor, eps: float):
    """Minus the dual with min_i z_i = -eps logsumexp_i(-z_i/eps), up to a constant, and its
    gradient in g."""
    g = torch.from_numpy(g).clone().requires_grad_()
    log_prob = df.ops.log_prob(y, x, 1.0, math.sqrt(eps / 2), g / eps)
    value = eps * (log_prob.mean() + (g / eps).logsumexp(0)) - weights @ g
    value.backward()
    assert g.grad is not None
    return float(value.detach()), g.grad.numpy()
