"""Few steps from noise to data: deterministic, and ancestral with four covariances, against the
exact law of a cloud whose axes are turned away from the coordinates', where they would do the
diagonal covariance a favour.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dfkernels import ops
from dfkernels.cloud import PointCloud
from dfkernels.fisher import DiffusionFisher
from dfkernels.methods import ancestral, samplers
from dfkernels.methods.denoiser import Denoiser
from dfkernels.methods.grid import nodes, time_grid
from dfkernels.schedule import EDM

from .langevin_chains import STD, draws

NOISE = (0.3, 20.0)
NAMES = {
    "ddim": "DDIM",
    "heun": "Heun",
    "none": "DDPM",
    "isotropic": "isotropic C",
    "diagonal": "diagonal C",
    "full": "full C, 3 Lanczos steps",
}
PASSES = {"ddim": 1, "heun": 2, "none": 1, "isotropic": 1, "diagonal": 2, "full": 4}


@dataclass(frozen=True)
class Steps:
    """The samplers at one number of steps."""

    steps: int
    distance: dict[str, float]  # energy distance of samples to draws from q
    log_prob: dict[str, float]  # mean log q of the samples
    path: dict[str, float]  # Kullback-Leibler divergence of the path's law, nats


@dataclass(frozen=True)
class Reference:
    """Draws from q at the lowest noise, to which samples are compared."""

    rows: Tensor  # in units
    within: float  # their mean distance from each other
    back: Tensor  # to the cloud's own axes, each in units of its deviation under q

    @classmethod
    def of(cls, x: Tensor, turn: Tensor) -> Reference:
        back = turn.T / (STD.square() + NOISE[0] ** 2).sqrt()
        return cls(x @ back, _within(x @ back), back)

    def energy_distance(self, x: Tensor) -> float:
        """2 E|a - b| - E|a - a'| - E|b - b'|, unbiased."""
        x = x @ self.back
        return 2 * torch.cdist(x, self.rows).mean().item() - _within(x) - self.within


def _within(x: Tensor) -> float:
    return (torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))).item()


def turn() -> Tensor:
    """A rotation of the eight axes, drawn once."""
    draw = torch.Generator().manual_seed(7)
    return torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=draw)).Q


def floor(y: Tensor, n: int) -> float:
    """The energy distance between independent draws from q, the largest of twelve."""
    reference = Reference.of(draws(y, n, NOISE[0], 5), turn())
    return max(abs(reference.energy_distance(draws(y, n, NOISE[0], 6 + i))) for i in range(12))


def compared(y: Tensor, counts: tuple[int, ...], n: int, few: int) -> list[Steps]:
    """All samplers from n exact draws at the highest noise; the paths' law from `few` of them."""
    denoiser = Denoiser.exact(PointCloud(y), EDM())
    reference = Reference.of(draws(y, n, NOISE[0], 5), turn())
    start = draws(y, n, NOISE[1], 4)
    found = []
    for steps in counts:
        t = time_grid(denoiser.schedule, steps, NOISE)
        ends = {}
        for name in NAMES:
            if name in samplers.METHODS:
                ends[name] = samplers.sample(denoiser, start, t, name, keep=1).x[-1]
            else:
                draw = torch.Generator().manual_seed(3)
                path = ancestral.sample(denoiser, start, t, name, generator=draw, keep=1)
                ends[name] = path.x[-1]
        found.append(
            Steps(
                steps,
                {name: reference.energy_distance(x) for name, x in ends.items()},
                {name: mean_log_prob(y, x) for name, x in ends.items()},
                divergence(y, t, few),
            )
        )
    return found


def divergence(y: Tensor, t: Tensor, n: int) -> dict[str, float]:
    """KL(q || p) of the ancestral samplers' paths: the sum over steps of E log q(x_s | x_t) - log
    p(x_s | x_t), where q(x_s | x_t) is known by Bayes' rule from log q at both levels, at exact
    draws of both. Gaussians p with the whole square root, so that it is d Lanczos steps for "full".
    """
    total, s = dict.fromkeys(ancestral.COVARIANCES, 0.0), nodes(EDM(), t).s
    for i in range(len(s) - 1):
        high, low = s[i].item(), s[i + 1].item()
        r = (low / high) ** 2
        x = draws(y, n, high, 100 + i)
        drawn = y[ops.draw(x, y, 1.0, high, seed=i)]
        noise = torch.Generator().manual_seed(1000 + i)
        xi = torch.randn(x.shape, dtype=x.dtype, generator=noise)
        to = r * x + (1 - r) * drawn + low * math.sqrt(1 - r) * xi
        across = high**2 - low**2
        log_step = -((x - to).square().sum(1) / across + x.shape[1] * math.log(across)) / 2
        log_true = _log_q(y, to, low) + log_step - _log_q(y, x, high)
        at = DiffusionFisher(x, PointCloud(y), 1.0, high)
        off = to - r * x - (1 - r) * at.denoised
        values, vectors = torch.linalg.eigh(at.to_dense())
        turned = (off[:, None] @ vectors)[:, 0]
        mean_value = at.trace()[:, None] / x.shape[1]
        for name, F, along in (
            ("none", torch.full_like(values, high**-2), off),
            ("isotropic", mean_value.expand_as(values), off),
            ("diagonal", at.diagonal(), off),
            ("full", values, turned),
        ):
            C = high**2 * (1 - high**2 * F)
            variance = low**2 * (1 - r) + (1 - r) ** 2 * C
            log_p = -(along.square() / variance + variance.log()).sum(1) / 2
            total[name] += (log_true - log_p).mean().item()
    return total


def mean_log_prob(y: Tensor, x: Tensor) -> float:
    """The mean of log q over x [n, d], at the lowest noise."""
    return _log_q(y, x, NOISE[0]).mean().item()


def _log_q(y: Tensor, x: Tensor, s: float) -> Tensor:
    return ops.log_prob(x, y, 1.0, s)
