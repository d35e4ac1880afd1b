"""Reflow of networks on two-dimensional sets: five ways to make a round's pairs, and what is left
of the law and of the bending of the paths after each round.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dfkernels.methods import reflow
from dfkernels.methods.denoiser import Denoiser
from dfkernels.methods.training import train
from dfkernels.schedule import RectifiedFlow

from . import chessboard
from .section import progress

KINDS = ("synthetic", "online", "anchor", "anchor, re-noised", "fresh")
SETS = ("chessboard", "circle")
SOLVERS = ("Heun", "10 steps", "1 step")
ROUNDS = 5
SHARE, NOISE = 0.3, 0.03  # of real pairs; delta of re-noised ones

_TIMES = torch.linspace(0, 1, 21, dtype=torch.float64)
_DATA = 100_000
# first round's steps, each later round's, pairs in a round, samples that are judged: full, quick
_SIZES = {False: (6000, 1500, 10_000, 3000), True: (20, 5, 100, 200)}


@dataclass(frozen=True)
class Law:
    """Samples beside as many of the truth: energy distance, top eigenvalue of the covariance over
    the truth's, and recall."""

    energy: float
    top: float
    recall: float


@dataclass(frozen=True)
class Round:
    """A flow: its law by each solver, the straightness of its paths with its standard error."""

    laws: dict[str, Law]
    straight: reflow.Straightness


@dataclass(frozen=True)
class Study:
    """What was found on one set: `rounds[kind]` holds rounds 1, 2, ...; `real` the same measures of
    other draws of the truth; `reversed` the power and kurtosis of x_0 of real data by the first
    flow, from the data itself and re-noised; `samples` [n, 2] to draw: of the truth, of the first
    round, and of the last of each kind."""

    rounds: dict[str, list[Round]]
    real: Law
    reversed: dict[str, tuple[float, float]]
    first: Denoiser
    samples: dict[str, Tensor]


class Velocity(nn.Module):
    """A multilayer perceptron v(x, t), small enough to err."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Linear(3, width),
                nn.SiLU(),
                nn.Linear(width, width),
                nn.SiLU(),
                nn.Linear(width, width),
                nn.SiLU(),
                nn.Linear(width, 2),
            )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None]], 1))


def draw(name: str, n: int, generator: torch.Generator) -> Tensor:
    """n points of a set, [n, 2], each coordinate with variance 1 and mean 0."""
    if name == "chessboard":
        return chessboard.sample(n, generator) / chessboard.STD
    # eight normals of standard deviation 0.1 about points of a circle of radius 1
    angle = torch.randint(8, (n,), generator=generator) * (math.pi / 4)
    centre = torch.stack([angle.cos(), angle.sin()], 1)
    return (centre + 0.1 * torch.randn(n, 2, generator=generator)) / math.sqrt(0.5 + 0.01)


def stages(name: str) -> list[str]:
    """What `study` reports to `step`."""
    first = 2 * [f"{name}: first round"]
    return first + [f"{name}: {kind}" for kind in KINDS for _ in range(2)]


def study(name: str, quick: bool, out: Path, step: Callable[[str], None]) -> Study:
    """Networks from checkpoints in `out`, or trained."""
    left = stages(name)
    first_steps, steps, count, n = _SIZES[quick]
    data = draw(name, _DATA, _seeded(0))
    first = _first(name, data, first_steps, out, progress(left[:2], step))
    judge = Judge(name, n)
    begin = judge.round(first)
    found, last = {}, {}
    for i, kind in enumerate(KINDS):
        flows = reflow.rounds(
            first,
            recipe(kind, first, data, count),
            (2 if quick else ROUNDS) - 1,
            steps=steps,
            folder=out / f"reflow-{name}-{kind.replace(', ', '-')}",
            configuration={"kind": kind, "pairs": count, "share": SHARE, "noise": NOISE},
            callback=progress(left[2 + 2 * i : 4 + 2 * i], step),
        )
        found[kind] = [begin, *map(judge.round, flows)]
        last[kind] = judge.samples(flows[-1])
    return Study(
        found,
        judge.real,
        {
            "from y itself": _normality(first, data[:n], 0.0),
            "re-noised": _normality(first, data[:n], NOISE),
        },
        first,
        {"data": judge.held, "round 1": judge.samples(first), **last},
    )


def recipe(
    kind: str, first: Denoiser, data: Tensor, count: int
) -> Callable[[Denoiser, torch.Generator], reflow.Pairs]:
    """How a kind of reflow makes `count` pairs of a round."""

    def made(current: Denoiser, generator: torch.Generator) -> reflow.Pairs:
        noise = torch.randn(count, 2, generator=generator)
        synthetic = reflow.pairs(current, noise, _TIMES)
        if kind == "synthetic":
            return synthetic
        y = data[torch.randperm(len(data), generator=generator)[: round(SHARE * count)]]
        if kind == "fresh":
            real = reflow.Pairs(torch.randn(y.shape, generator=generator), y)
        else:
            by = current if kind == "online" else first
            delta = NOISE if kind == "anchor, re-noised" else 0.0
            real = reflow.reverse_pairs(by, y, _TIMES, generator, noise=delta)
        return reflow.mix(synthetic, real, SHARE, generator)

    return made


def _first(
    name: str, data: Tensor, steps: int, out: Path, callback: Callable[[int, int], None]
) -> Denoiser:
    """A rectified flow, trained on independent pairs that are drawn anew for each step."""
    flow = Denoiser(Velocity(), RectifiedFlow(), "flow")

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        y = data[torch.randint(len(data), (256,), generator=generator)]
        noise = torch.randn(y.shape, generator=generator)
        return reflow.loss(flow, reflow.Pairs(noise, y), generator)

    assert isinstance(flow.network, nn.Module)
    trained = train(
        flow.network,
        loss,
        steps=steps,
        lr=5e-3,
        generator=_seeded(1),
        checkpoint=out / f"reflow-{name}-first.pt",
        configuration={"data": name},
        callback=callback,
    )
    return Denoiser(trained, RectifiedFlow(), "flow")


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normality(flow: Denoiser, y: Tensor, delta: float) -> tuple[float, float]:
    found = reflow.reverse_pairs(flow, y, _TIMES, _seeded(4), noise=delta)
    return found.noise_power, found.noise_kurtosis


# ---- measures


class Judge:
    """Compares n samples of a flow, always from the same noise, with n held-out points."""

    def __init__(self, name: str, n: int) -> None:
        generator = _seeded(2)
        self.held, other = (draw(name, n, generator) for _ in range(2))
        self.noise = torch.randn(n, 2, generator=generator)
        self.radius = nearest(self.held, other).median().item()
        others = [self.law(draw(name, n, generator)) for _ in range(8)]
        self.real = Law(*(sum(getattr(law, f) for law in others) / 8 for f in vars(others[0])))

    def law(self, samples: Tensor) -> Law:
        largest = lambda x: torch.linalg.eigvalsh(x.double().T.cov())[-1].item()
        recall = (nearest(self.held, samples) <= self.radius).double().mean().item()
        return Law(
            energy_distance(samples, self.held), largest(samples) / largest(self.held), recall
        )

    def samples(self, flow: Denoiser) -> Tensor:
        return reflow.pairs(flow, self.noise, _TIMES).sample

    def round(self, flow: Denoiser) -> Round:
        made = reflow.pairs(flow, self.noise, _TIMES)
        laws = {"Heun": self.law(made.sample)}
        for name, steps in (("10 steps", 10), ("1 step", 1)):
            t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
            laws[name] = self.law(reflow.pairs(flow, self.noise, t, "ddim").sample)
        return Round(laws, reflow.straightness(flow, made, _seeded(3)))


def nearest(points: Tensor, samples: Tensor) -> Tensor:
    """The distance of each point to the nearest of the samples, [n]."""
    return torch.cdist(points, samples).amin(1)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of two samples, the pairs of a point with itself left
    out: 0 on average for two samples of one law, whatever their size."""
    between = torch.cdist(x, y).double().mean()
    within = [torch.cdist(z, z).double().sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    return (2 * between - within[0] - within[1]).item()
