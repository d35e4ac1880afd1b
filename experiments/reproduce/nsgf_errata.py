"""What is wrong in print, or weak in practice, of NSGF: each with its numbers, in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dfkernels.methods import nsgf
from dfkernels.methods.sinkhorn import divergence

from .nsgf_metrics import wasserstein
from .nsgf_sets import SETS, Set

__all__ = ["Batches", "Steps", "Unconverged", "batches", "signs", "step_sizes", "unconverged"]

BLUR = 0.5  # of 8gaussians
RUNS = ((BLUR, 0.2), (BLUR, 1.0), (BLUR, 2.0), (2.0, 1.0))  # blur, eta
SHOWN = (0, 1, 2, 5, 9, 10)  # steps
SCALINGS = (0.5, 0.8, 0.9, 0.95)
NEAR = 0.1  # the step that shows which direction is which


def particles(task: Set, n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return task.source(n, generator).double(), task.target(n, generator).double()


class Steps(NamedTuple):
    """The 2-Wasserstein distance to the target after the steps SHOWN."""

    blur: float
    eta: float
    distance: list[float]


def step_sizes(n: int) -> list[Steps]:
    """n particles to n points of 8gaussians, also with the step size that `nsgf.flow` refuses."""
    x, y = particles(SETS["8gaussians"], n, 0)
    found = []
    for blur, eta in RUNS:
        state, v, distances = x, None, []
        for k in range(SHOWN[-1] + 1):
            if k in SHOWN:
                distances.append(wasserstein(state, y))
            v = nsgf.velocity(state, y, blur, start=v)
            state = state + eta * v.value
        found.append(Steps(blur, eta, distances))
    return found


class Unconverged(NamedTuple):
    """What one pass over a schedule of eps leaves: updates, marginal error, and the error of the
    velocity relative to its norm."""

    scaling: str
    updates: int
    marginal_error: float
    velocity_error: float


def unconverged(n: int, blur: float = BLUR) -> list[Unconverged]:
    """GeomLoss's loop, one symmetrised update for each eps of a falling schedule and a last half
    step, in plain PyTorch, beside ours at tol = 1e-4."""
    x, y = particles(SETS["8gaussians"], n, 0)
    want = nsgf.velocity(x, y, blur, tol=1e-10, max_iter=10_000).value
    relative = lambda v: float((v - want).norm() / want.norm())
    rows = []
    for scaling in SCALINGS:
        levels = schedule(float((x.amax(0) - x.amin(0)).norm()), blur, scaling)
        f, g = _one_pass(x, y, levels)
        plan = torch.exp((f[:, None] + g - _cost(x, y)) / blur**2) / (n * n)
        error = float((plan.sum(0) - 1 / n).abs().sum())
        itself = _one_pass(x, x, levels)[1]
        v = _map(x, y, g, blur) - _map(x, x, itself, blur)
        rows.append(Unconverged(f"{scaling:g}", len(levels) + 1, error, relative(v)))
    ours = nsgf.velocity(x, y, blur)
    return [
        *rows,
        Unconverged("ours", ours.xy.iterations, ours.marginal_error, relative(ours.value)),
    ]


def schedule(diameter: float, blur: float, scaling: float) -> list[float]:
    """eps from the squared diameter down to the squared blur, by scaling^2 each, both ends in."""
    count = math.ceil(math.log(blur / diameter) / math.log(scaling))
    return [diameter**2, *((diameter * scaling**k) ** 2 for k in range(count)), blur**2]


def _cost(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y).square() / 2


def _softmin(cost: Tensor, potential: Tensor, eps: float) -> Tensor:
    return -eps * (torch.logsumexp((potential - cost) / eps, 1) - math.log(cost.shape[1]))


def _one_pass(x: Tensor, y: Tensor, levels: list[float]) -> tuple[Tensor, Tensor]:
    """The potential f of the last half-step, and the g that it and its gradient are taken from."""
    cost = _cost(x, y)
    f, g = (_softmin(c, c.new_zeros(c.shape[1]), levels[0]) for c in (cost, cost.T))
    for eps in levels:
        f, g = (f + _softmin(cost, g, eps)) / 2, (g + _softmin(cost.T, f, eps)) / 2
    return _softmin(cost, g, levels[-1]), g


def _map(x: Tensor, y: Tensor, g: Tensor, blur: float) -> Tensor:
    return torch.softmax((g - _cost(x, y)) / blur**2, 1) @ y


class Signs(NamedTuple):
    """The divergence at the start, after a small step along v and one against it; and after T and
    T + 1 steps of the size of the flow."""

    start: float
    along: float
    against: float
    steps: float
    one_more: float


def signs(n: int, eta: float, steps: int) -> Signs:
    x, y = particles(SETS["8gaussians"], n, 0)
    S = lambda x: float(divergence(x, y, BLUR).value)
    v = nsgf.velocity(x, y, BLUR).value
    path = nsgf.flow(x, y, BLUR, steps=steps + 1, eta=eta).divergence[-2:].tolist()
    return Signs(S(x), S(x + NEAR * v), S(x - NEAR * v), *path)


class Batches(NamedTuple):
    """For flows of n points: by how much the velocity of one particle at the start differs from
    batch to batch, and its mean over batches from that of a large one, both relative (rms)."""

    n: int
    spread: float
    bias: float


def batches(sizes: list[int], large: int, repeats: int) -> list[Batches]:
    """The same 32 particles in batches that are otherwise drawn anew."""
    task = SETS["8gaussians"]
    own = particles(task, 32, 0)[0]

    def v(n: int, seed: int) -> Tensor:
        x, y = particles(task, n, seed)
        return nsgf.velocity(torch.cat([own, x[32:]]), y, BLUR).value[:32]

    size = lambda v: float(v.square().sum(-1).mean().sqrt())
    want, rows = v(large, 1), []
    for n in sizes:
        found = torch.stack([v(n, seed) for seed in range(2, 2 + repeats)])
        mean = found.mean(0)
        spread = size(found - mean) * (repeats / (repeats - 1)) ** 0.5
        rows.append(Batches(n, spread / size(want), size(mean - want) / size(want)))
    return rows
