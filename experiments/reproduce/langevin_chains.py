"""Preconditioned Langevin chains on a cloud whose directions differ 60-fold, and how often its
Fisher information is indefinite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dfkernels.cloud import PointCloud
from dfkernels.fisher import DiffusionFisher
from dfkernels.methods.denoiser import Denoiser
from dfkernels.methods.langevin import gibbs, langevin
from dfkernels.schedule import EDM

SIGMA, STEPS, AXES = 0.3, 100, (0, 4, 7)
STD = torch.logspace(math.log10(3), math.log10(0.05), 8, dtype=torch.float64)
# variance / true variance in the longest, 5th and shortest direction, and the acceptance
EXPECTED = {
    "Langevin": (0.58, 1.39, 1.35, None),
    "|S| + 0.05": (1.22, 2.00, 1.35, None),
    "M₁": (0.83, 1.67, 1.36, None),
    "M₁, Metropolis": (0.52, 0.90, 1.08, 0.65),
    "|S| + 0.3, Metropolis": (0.39, 1.08, 0.92, 0.64),
    "Gibbs": (0.66, 0.97, 0.95, 1.0),
}
# preconditioner, damping, metropolis
HOW: dict[str, tuple[str, float | None, bool]] = {
    "Langevin": ("none", None, False),
    "|S| + 0.05": ("damped", 0.05, False),
    "M₁": ("gibbs", None, False),
    "M₁, Metropolis": ("gibbs", None, True),
    "|S| + 0.3, Metropolis": ("damped", 0.3, True),
}


@dataclass(frozen=True)
class Row:
    """One kind of chain: the ratio of variances in all directions, step by step [k, 8]."""

    name: str
    count: int
    steps: Tensor
    ratios: Tensor
    acceptance: float | None

    @property
    def last(self) -> tuple[float, ...]:
        return tuple(self.ratios[-1, list(AXES)].tolist())

    @property
    def numbers(self) -> tuple[float | None, ...]:
        """As in EXPECTED."""
        return *self.last, self.acceptance

    @property
    def error(self) -> float:
        """The relative standard error of a normal law's variance."""
        return (2 / self.count) ** 0.5


def cloud() -> Tensor:
    """1000 atoms in two halves that lie 2 apart along the longest axis."""
    draw = torch.Generator().manual_seed(0)
    y = torch.randn(1000, 8, dtype=torch.float64, generator=draw) * STD
    y[::2, 0] += 1
    y[1::2, 0] -= 1
    return y


def draws(y: Tensor, n: int, sigma: float, seed: int) -> Tensor:
    """n exact draws from q at this noise."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(y), (n,), generator=draw)
    return y[rows] + sigma * torch.randn(n, y.shape[1], dtype=torch.float64, generator=draw)


def curvature(y: Tensor, n: int) -> tuple[float, float]:
    """Of sigma^2 F at draws from q: the smallest eigenvalue, and the share of draws at which one is
    negative.
    """
    F = DiffusionFisher(draws(y, n, SIGMA, 1), PointCloud(y), 1.0, SIGMA)
    least = SIGMA**2 * F.eigsh(1, largest=False)[0][:, 0]
    return least.min().item(), (least < 0).double().mean().item()


def chains(y: Tensor, n: int, at: tuple[int, ...]) -> list[Row]:
    """n chains of each kind from the mean, with their variances after `at` steps."""
    denoiser = Denoiser.exact(PointCloud(y), EDM())
    true = y.var(0, correction=0) + SIGMA**2
    found = []
    for name in EXPECTED:
        draw = torch.Generator().manual_seed(2)
        x, ratios, taken, done = y.mean(0).expand(n, -1), [], 0.0, 0
        for k in at:
            if name == "Gibbs":
                x = gibbs(denoiser, x, SIGMA, k - done, generator=draw)
            else:
                kind, damping, metropolis = HOW[name]
                part = langevin(
                    *(denoiser, x, SIGMA, k - done, kind),
                    generator=draw,
                    damping=damping,
                    metropolis=metropolis,
                )
                x = part.x
                if part.acceptance is not None:
                    taken += part.acceptance.mean().item() * (k - done)
            ratios.append(x.var(0) / true)
            done = k
        acceptance = 1.0 if name == "Gibbs" else taken / done if "Metropolis" in name else None
        found.append(Row(name, n, torch.tensor(at), torch.stack(ratios), acceptance))
    return found
