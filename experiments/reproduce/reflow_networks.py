"""Reflow of networks: five ways to make a round's pairs, and what is left of the law and of the
bending of the paths after each round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dfkernels.methods import reflow
from dfkernels.methods.denoiser import Denoiser
from dfkernels.methods.training import train
from dfkernels.schedule import RectifiedFlow

from . import chessboard, digits
from .section import progress

KINDS = ("synthetic", "online", "anchor", "anchor, re-noised", "fresh")
SOLVERS = ("Heun", "10 steps", "1 step")
SHARE, NOISE = 0.3, 0.03  # of real pairs; delta of re-noised ones

_TIMES = torch.linspace(0, 1, 21, dtype=torch.float64)


@dataclass(frozen=True)
class Setting:
    """A set, and what a round of it takes: pairs, training steps of the first round and of each
    later one, the layers' width, samples that are judged."""

    name: str
    pairs: int
    first: int = 5000
    steps: int = 1000
    width: int = 64
    judged: int = 3000

    @property
    def stages(self) -> list[str]:
        """What `study` reports to `step`."""
        first = 2 * [f"{self.name}: first round"]
        return first + [f"{self.name}: {kind}" for kind in KINDS for _ in range(2)]

    def quick(self) -> Setting:
        return replace(self, pairs=50, first=20, steps=5, width=32, judged=100)


SETTINGS = (
    Setting("chessboard", 6000, steps=800),
    Setting("digits", 3000, steps=800, width=256, judged=1500),
)


@dataclass(frozen=True)
class Law:
    """Samples beside the truth: energy distance, top eigenvalue of the covariance over the truth's,
    and recall."""

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
    flow, from the data itself and re-noised; `samples` [n, d] to draw: of the truth, of the first
    round, and of the last of each kind."""

    rounds: dict[str, list[Round]]
    real: Law
    reversed: dict[str, tuple[float, float]]
    first: Denoiser
    samples: dict[str, Tensor]


class Velocity(nn.Module):
    """A multilayer perceptron v(x, t)."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Linear(d + 1, width),
                nn.SiLU(),
                nn.Linear(width, width),
                nn.SiLU(),
                nn.Linear(width, width),
                nn.SiLU(),
                nn.Linear(width, d),
            )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None]], 1))


@dataclass(frozen=True)
class Data:
    """Points to train on, held out, and other draws of the truth, each [n, d]; mean 0, variance 1
    over all coordinates."""

    train: Tensor
    held: Tensor
    others: list[Tensor]


def chessboard_points(n: int, generator: torch.Generator) -> Tensor:
    """n points of the chessboard, each coordinate with variance 1 and mean 0."""
    return chessboard.sample(n, generator) / chessboard.STD


def load(setting: Setting) -> Data:
    """The set of a setting."""
    draw, n = _seeded(2), setting.judged
    if setting.name != "digits":
        others = [chessboard_points(n, draw) for _ in range(9)]
        return Data(chessboard_points(100_000, _seeded(0)), others[0], others[1:])
    known = digits.load()
    shift, scale = known.train.mean(), known.std
    made = lambda images: ((digits.dequantised(images, draw) - shift) / scale).flatten(1)
    copies = torch.cat([made(known.train) for _ in range(8)])
    return Data(copies, made(known.held), [made(known.train)[:n]])


def study(setting: Setting, out: Path, step: Callable[[str], None], rounds: int) -> Study:
    """Rounds 1 to `rounds` of every kind; networks from checkpoints in `out`, or trained."""
    left, data = setting.stages, load(setting)
    first = _first(setting, data.train, out, progress(left[:2], step))
    judge = Judge(data, setting.judged)
    begin = judge.round(first)
    found, last = {}, {}
    for i, kind in enumerate(KINDS):
        flows = reflow.rounds(
            first,
            recipe(kind, first, data.train, setting.pairs),
            rounds - 1,
            steps=setting.steps,
            folder=out / f"reflow-{setting.name}-{kind.replace(', ', '-')}",
            configuration={"kind": kind, "pairs": setting.pairs, "share": SHARE, "noise": NOISE},
            callback=progress(left[2 + 2 * i : 4 + 2 * i], step),
        )
        found[kind] = [begin, *map(judge.round, flows)]
        last[kind] = judge.pairs(flows[-1]).sample
    normality = lambda delta: _normality(first, data.train[: setting.judged], delta)
    return Study(
        found,
        judge.real,
        {"from y itself": normality(0.0), "re-noised": normality(NOISE)},
        first,
        {"data": data.others[0], "round 1": judge.pairs(first).sample, **last},
    )


def recipe(
    kind: str, first: Denoiser, data: Tensor, count: int
) -> Callable[[Denoiser, torch.Generator], reflow.Pairs]:
    """How a kind of reflow makes `count` pairs of a round."""

    def made(current: Denoiser, generator: torch.Generator) -> reflow.Pairs:
        noise = torch.randn(count, *data.shape[1:], generator=generator)
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
    setting: Setting, data: Tensor, out: Path, callback: Callable[[int, int], None]
) -> Denoiser:
    """A rectified flow, trained on independent pairs that are drawn anew for each step."""
    network = Velocity(data.shape[1], setting.width)
    flow = Denoiser(network, RectifiedFlow(), "flow")

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        y = data[torch.randint(len(data), (256,), generator=generator)]
        noise = torch.randn(y.shape, generator=generator)
        return reflow.loss(flow, reflow.Pairs(noise, y), generator)

    trained = train(
        network,
        loss,
        steps=setting.first,
        lr=5e-3 if setting.width < 100 else 2e-3,
        generator=_seeded(1),
        checkpoint=out / f"reflow-{setting.name}-first.pt",
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
    """Compares n samples of a flow, always from the same noise, with held-out points."""

    def __init__(self, data: Data, n: int) -> None:
        self.held = data.held
        self.noise = torch.randn(n, data.held.shape[1], generator=_seeded(3))
        self.radius = nearest(self.held, data.others[0]).median().item()
        laws = [self.law(other) for other in data.others]
        mean = lambda field: sum(getattr(law, field) for law in laws) / len(laws)
        self.real = Law(mean("energy"), mean("top"), mean("recall"))

    def law(self, samples: Tensor) -> Law:
        largest = lambda x: torch.linalg.eigvalsh(x.double().T.cov())[-1].item()
        recall = (nearest(self.held, samples) <= self.radius).double().mean().item()
        return Law(
            energy_distance(samples, self.held), largest(samples) / largest(self.held), recall
        )

    def pairs(self, flow: Denoiser) -> reflow.Pairs:
        return reflow.pairs(flow, self.noise, _TIMES)

    def round(self, flow: Denoiser) -> Round:
        made = self.pairs(flow)
        laws = {"Heun": self.law(made.sample)}
        for name, steps in (("10 steps", 10), ("1 step", 1)):
            t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
            laws[name] = self.law(reflow.pairs(flow, self.noise, t, "ddim").sample)
        return Round(laws, reflow.straightness(flow, made, _seeded(5)))


def nearest(points: Tensor, samples: Tensor) -> Tensor:
    """The distance of each point to the nearest of the samples, [n]."""
    return torch.cdist(points, samples).amin(1)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of two samples, the pairs of a point with itself left
    out: 0 on average for two samples of one law, whatever their size."""
    between = torch.cdist(x, y).double().mean()
    within = [torch.cdist(z, z).double().sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    return (2 * between - within[0] - within[1]).item()
