"""The correction of LML as published: the angle by which it turns a step, and what is left of it in
float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dfkernels.cloud import PointCloud
from dfkernels.methods.denoiser import Denoiser
from dfkernels.methods.grid import nodes
from dfkernels.methods.langevin import printed_correction
from dfkernels.schedule import Tabulated

# the published lamb of CIFAR-10, by the number of evaluations
LAMB = {5: 8e-4, 6: 8e-4, 8: 1e-3, 10: 8e-4, 15: 1e-3, 20: 5e-4, 50: 1e-4, 100: 5e-5}
# sines of the angle in float32: of the first step, and the median over the steps
EXPECTED = {
    5: (1.00, 0.26), 6: (1.00, 0.28), 8: (0.50, 0.12), 10: (0.27, 0.07), 15: (0.10, 0.02),
    20: (0.09, 0.02), 50: (0.05, 0.013), 100: (0.025, 0.006),
}  # fmt: skip
D, ATOMS, SAMPLES = 3072, 64, 16
KAPPAS = (1e-9, 1e-8, 1e-7, 1e-6, 1e-4, 1e-2, 0.5)


@dataclass(frozen=True)
class Run:
    """Samples at one number of steps."""

    steps: int
    first: float  # sine of the first step's angle in float32, median over samples
    median: float  # the median over the steps of such medians
    rest: float  # the largest 1 - cos in float64
    moved: dict[str, float]  # |x - baseline|/|baseline| at the end
    power: dict[str, float]  # |eps|^2/d at the end: 1 for draws from q


@dataclass(frozen=True)
class Kappa:
    """One correction with kappa > 0, in float64."""

    kappa: float
    angle: float  # between n' and n, degrees
    predicted: float  # the angle to n + tau (n - n_prev)_perp


def ddpm() -> Tabulated:
    """DDPM's linear betas, 1e-4 to 0.02 over 1000 steps."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return Tabulated(torch.cumprod(1 - betas, 0))


def images(n: int) -> Tensor:
    """Smooth random images [n, 3072] of unit variance, 3 x 32 x 32."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.randn(n, 3, 6, 6, dtype=torch.float64, generator=draw)
    whole = torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").flatten(1)
    return (whole - whole.mean()) / whole.std()


def times(steps: int) -> Tensor:
    """The timesteps of diffusers' "linspace"."""
    return torch.linspace(999, 0, steps + 1, dtype=torch.float64).round()


def sine(n: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The sine of the angle between vectors [B, d] in float64, and 1 - cos."""
    n, other = (v / v.norm(dim=1, keepdim=True) for v in (n.double(), other.double()))
    return (2 * ((n - other).norm(dim=1) / 2).clamp(max=1).asin()).sin(), 1 - (n * other).sum(1)


def turned(n: Tensor, sines: Tensor, draw: torch.Generator) -> Tensor:
    """n turned by angles of these sines [B] in directions drawn at random, its norm kept."""
    noise = torch.randn(n.shape, dtype=n.dtype, generator=draw)
    along = (noise * n).sum(1, keepdim=True) / n.square().sum(1, keepdim=True)
    across = noise - along * n
    across = across * (n.norm(dim=1) / across.norm(dim=1))[:, None]
    return (1 - sines.square()).sqrt()[:, None] * n + sines[:, None] * across


def sampled(steps: int) -> Run:
    """The same noise by the first-order solver, plain, corrected in both dtypes, and turned at
    random by as much as float32 turns it.
    """
    schedule, lamb = ddpm(), LAMB[steps]
    denoiser = Denoiser.exact(PointCloud(images(ATOMS)), schedule)
    path = nodes(schedule, times(steps))
    draw = torch.Generator().manual_seed(1)
    start = torch.randn(SAMPLES, D, dtype=torch.float64, generator=draw)
    x = dict.fromkeys(("baseline", "float64", "float32", "noise"), start)
    sines, rest = [], 0.0
    for i in range(steps):
        growth = path.s[i] / path.s[i + 1] - 1
        eps = denoiser.eps(torch.cat(list(x.values())), path.t[i]).chunk(len(x))
        n = dict(zip(x, (-path.sigma[i + 1] * growth * e for e in eps), strict=True))
        narrow = n["baseline"].float()
        sines.append(sine(narrow, printed_correction(narrow, lamb))[0])
        n["float64"] = printed_correction(n["float64"], lamb)
        rest = (
            max(rest, sine(n["baseline"], n["float64"])[1].abs().max().item()) if i == 0 else rest
        )
        narrow = n["float32"].float()
        n["float32"] = printed_correction(narrow, lamb).double()
        n["noise"] = turned(n["noise"], sine(narrow, n["float32"])[0].clamp(max=1), draw)
        x = {name: path.alpha[i + 1] / path.alpha[i] * x[name] + n[name] for name in x}
    size = x["baseline"].norm(dim=1)
    moved = {k: ((v - x["baseline"]).norm(dim=1) / size).median().item() for k, v in x.items()}
    power = {k: denoiser.eps(v, path.t[-1]).square().mean().item() for k, v in x.items()}
    middle = torch.stack(sines).median(1).values.quantile(0.5).item()
    return Run(steps, sines[0].median().item(), middle, rest, moved, power)


def extrapolation(lamb: float = LAMB[10]) -> list[Kappa]:
    """kappa > 0 for two contributions at a right angle but for chance, in float64."""
    draw = torch.Generator().manual_seed(2)
    n, before = torch.randn(2, 1, D, dtype=torch.float64, generator=draw)
    found = []
    for kappa in KAPPAS:
        e = kappa * before + (1 - kappa) * n
        square = e.square().sum()
        step = n - before
        across = step - (step * e).sum() / square * e
        tau = kappa * (lamb + square) / lamb * square / (n * e).sum()
        given = printed_correction(n, lamb, before, kappa)
        angle, predicted = (
            math.degrees(math.acos(min(1.0, 1 - sine(n, other)[1].item())))
            for other in (given, e + tau * across)
        )
        found.append(Kappa(kappa, angle, predicted))
    return found


def leak(kappa: float = 1e-2, steps: int = 10) -> float:
    """How far the second of two batches ends from where it ends alone, relative: the published
    scheduler keeps the last contribution of one batch for the first step of the next.
    """
    schedule, lamb = ddpm(), LAMB[steps]
    denoiser = Denoiser.exact(PointCloud(images(ATOMS)), schedule)
    path = nodes(schedule, times(steps))
    draw = torch.Generator().manual_seed(3)
    batches = torch.randn(2, SAMPLES, D, dtype=torch.float64, generator=draw)

    def batch(x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        for i in range(steps):
            growth = path.s[i] / path.s[i + 1] - 1
            n = -path.sigma[i + 1] * growth * denoiser.eps(x, path.t[i])
            given = printed_correction(n, lamb, before, kappa if before is not None else 0.0)
            x, before = path.alpha[i + 1] / path.alpha[i] * x + given, n
        return x, before

    alone, _ = batch(batches[1], None)
    after, _ = batch(batches[1], batch(batches[0], None)[1])
    return ((after - alone).norm(dim=1) / alone.norm(dim=1)).median().item()
