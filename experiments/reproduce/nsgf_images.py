"""NSGF++ on images, scikit-learn's digits and MNIST: two phases, and the time between them.

The metric of the paper's images, FID, needs a network that is not here. The energy distance in the
space of pixels takes its place: it is zero for equal laws only, needs no features, and has a floor,
that between training and held-out images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dfkernels.cloud import PointCloud
from dfkernels.methods import nsgf
from dfkernels.methods.networks import VectorNet
from dfkernels.methods.reflow import Pairs

from .digits import Digits
from .nsgf_metrics import energy_distance
from .nsgf_networks import BATCH, Effort, fitted, straight_denoiser, straight_loss

__all__ = ["BLUR", "ETA", "PLUS", "SAMPLES", "STEPS", "Row", "Study", "Times", "study"]

BLUR, ETA, STEPS = 1.0, 0.4, 5  # of the first phase; an image is 10 to 20 from noise
TRAINING, FLOWS, FLOWN = 1200, 40, 256  # at most: steps; flows of the pool, and their points
SAMPLES = 1500
COUNTS = (5, 15, 55)  # steps of the second phase
PLUS = ("NSGF++, trained time", "NSGF++, exact time")
COMPARED = 500  # points at which times are compared


@dataclass(frozen=True)
class Row:
    """A way to sample: evaluations of networks for a sample, and the energy distance of samples to
    held-out images."""

    name: str
    evaluations: int
    distance: float


@dataclass(frozen=True)
class Times:
    """On points of one law: times predicted and exact, and what t itself leaves open."""

    law: str
    trained: Tensor
    exact: Tensor
    std: Tensor

    @property
    def error(self) -> float:
        """Root mean square of trained less exact."""
        return (self.trained - self.exact).square().mean().sqrt().item()

    @property
    def spread(self) -> float:
        """Root mean square of t less its mean given x: what no predictor can know."""
        return self.std.square().mean().sqrt().item()


@dataclass(frozen=True)
class Study:
    name: str
    side: int  # pixels
    known: int  # training images
    held: int
    rows: list[Row]
    floor: list[float]  # over random splits
    times: list[Times]
    samples: dict[str, Tensor]  # ten of each, and held-out images, [10, d]

    def best(self, name: str) -> float:
        """The least energy distance of a way to sample."""
        return min(row.distance for row in self.rows if row.name == name)


def study(name: str, data: Digits, quick: bool, budget: Effort, out: Path) -> Study:
    """Of square images; networks are kept in `out` under the name."""
    y, held = data.train.flatten(1), data.held.flatten(1)
    velocity, straight, predictor = _networks(name, y, budget, out)
    flow = straight_denoiser(straight)
    n, generator = (100 if quick else SAMPLES), torch.Generator().manual_seed(11)
    noise = torch.randn(n, y.shape[1], generator=generator)
    counts = COUNTS[:1] if quick else COUNTS
    rows, samples = [], {}

    def add(way: str, evaluations: int, x: Tensor) -> None:
        rows.append(Row(way, evaluations, energy_distance(x, held)))
        samples[f"{way}, {evaluations}"] = x[:10]

    with torch.no_grad():
        near = nsgf.sample(velocity, noise, steps=STEPS, eta=ETA).x[-1]
        add("NSGF alone", STEPS, near)
        times = _times(predictor, near, noise[:COMPARED], y, held, generator)
        # at 1, which float32 may round to, there is nothing left to do
        starts = times[0].trained.clamp_max(1 - 1e-3), times[0].exact
        for way, extra, start in zip(PLUS, (1, 0), starts, strict=True):
            for count in counts:
                end = nsgf.straight_flow(flow, near, start, steps=count)
                add(way, STEPS + extra + count, end)
        for count in counts:
            add("FM", STEPS + count, nsgf.straight_flow(flow, noise, 0.0, steps=STEPS + count))
    samples["held out"] = held[:10]
    splits = 3 if quick else 20
    floor = _floor(torch.cat([y, held]), n, len(held), splits)
    side = data.train.shape[-1]
    return Study(name, side, len(y), len(held), rows, floor, times, samples)


def _times(
    predictor: nn.Module,
    near: Tensor,
    noise: Tensor,
    y: Tensor,
    held: Tensor,
    generator: torch.Generator,
) -> list[Times]:
    """At the end of the first phase, and at points of the paths from some noise to either images;
    the exact times by one call for all of them."""

    def on_paths(images: Tensor) -> Tensor:
        pairs = images[torch.randint(len(images), (len(noise),), generator=generator)]
        return Pairs(noise, pairs).at(torch.rand(len(noise), generator=generator))

    laws = {
        "end of NSGF": near,
        "paths to training images": on_paths(y),
        "paths to held-out images": on_paths(held),
    }
    points = torch.cat([*laws.values()])
    exact = nsgf.time_posterior(points, PointCloud(y))
    sizes = [len(x) for x in laws.values()]
    parts = zip(*(t.split(sizes) for t in (predictor(points), *exact)), strict=True)
    return [Times(law, *part) for law, part in zip(laws, parts, strict=True)]


def _networks(
    data: str, y: Tensor, budget: Effort, out: Path
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """v, u and tau, each kept in `out`."""
    d = y.shape[1]

    def noise(n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, d, generator=generator)

    def image(n: int, generator: torch.Generator) -> Tensor:
        return y[torch.randint(len(y), (n,), generator=generator)]

    def velocity():
        pool = nsgf.trajectory_pool(
            noise,
            image,
            BLUR,
            batches=min(budget.batches, FLOWS),
            n=FLOWN,
            steps=STEPS,
            eta=ETA,
            generator=torch.Generator().manual_seed(1),
        )
        return lambda network, generator: nsgf.velocity_loss(network, pool, generator)

    def on_pairs(loss):
        return lambda: (
            lambda network, generator: loss(
                network, noise(BATCH, generator), image(BATCH, generator), generator
            )
        )

    def time_loss(network, x_0, y, generator):
        return nsgf.time_loss(network, Pairs(x_0, y), generator)

    def kept(network: nn.Module, name: str, loss) -> nn.Module:
        about = {"network": name, "blur": BLUR, "eta": ETA, "pool": min(budget.batches, FLOWS)}
        path, steps = out / f"nsgf-{data.lower()}-{name}.pt", min(budget.training, TRAINING)
        return fitted(network, loss, path, steps, about)

    event = VectorNet(d, width=budget.width, depth=3)
    v = kept(event, "velocity", velocity)
    u = kept(VectorNet(d, width=budget.width, depth=3), "straight", on_pairs(straight_loss))
    scalar = VectorNet(d, output="scalar", width=budget.width // 2, depth=3)
    tau = kept(nsgf.TimePredictor(scalar), "time", on_pairs(time_loss))
    return v, u, tau


def _floor(images: Tensor, n: int, held: int, splits: int) -> list[float]:
    """The distance of two random parts of the data, of the sizes that samples and held-out images
    have."""
    found = []
    for seed in range(splits):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        found.append(energy_distance(images[order[held : held + n]], images[order[:held]]))
    return found
