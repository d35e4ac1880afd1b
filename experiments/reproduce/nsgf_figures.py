"""Figures of the NSGF experiment: particles over the target, step sizes, times, images."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import nn

from dfkernels._page.theme import Theme
from dfkernels.methods import nsgf

from .nsgf_errata import SHOWN, Steps
from .nsgf_images import Study
from .nsgf_networks import ETA, STEPS
from .nsgf_sets import SETS
from .section import Picture

FRAMES = (0, 1, 2, 5, 10)
POINTS = 800


def pictures(
    networks: dict[str, nn.Module], runs: list[Steps], studies: list[Study]
) -> list[Picture]:
    """Each is drawn when asked for."""
    planar = [
        Picture(
            "flow",
            f"The trained flow: {POINTS} fresh points of the source after 0, 1, 2, 5 and 10 steps"
            f" of η = {ETA:g}, over points of the target (grey).",
            lambda theme: flow(networks, theme),
        ),
        Picture(
            "step_size",
            "Distance of particles to the target against the number of steps. Next to the target a"
            " step multiplies the distance by |1 − η|, so that at η = 2 nothing is gained.",
            lambda theme: step_size(runs, theme),
        ),
    ]
    return [*planar, *(picture for study in studies for picture in _of_images(study))]


def _of_images(study: Study) -> list[Picture]:
    name = study.name
    return [
        Picture(
            f"time-{name.lower()}",
            f"The time that a noisy image of {name} looks like: the trained predictor against"
            " E[t|x], exact, at points of the straight paths to training and to held-out images,"
            " and at the end of the first phase.",
            lambda theme: times(study, theme),
        ),
        Picture(
            name.lower(),
            f"{name[0].upper()}{name[1:]}: ten samples of each, from the same noise, after as many"
            " evaluations as stand beside them; last row: held-out images.",
            lambda theme: images(study, theme),
        ),
    ]


def flow(networks: dict[str, nn.Module], theme: Theme) -> Figure:
    figure = Figure(figsize=(8.6, 1.72 * len(networks) + 0.3), layout="constrained")
    axes = figure.subplots(len(networks), len(FRAMES), squeeze=False)
    for row, (name, network) in zip(axes, networks.items(), strict=True):
        generator = torch.Generator().manual_seed(5)
        y = SETS[name].target(4 * POINTS, generator)
        with torch.no_grad():
            path = nsgf.sample(network, SETS[name].source(POINTS, generator), steps=STEPS, eta=ETA)
        middle, reach = (y.amax(0) + y.amin(0)) / 2, 0.65 * (y.amax(0) - y.amin(0)).max().item()
        for axis, k in zip(row, FRAMES, strict=True):
            axis.scatter(*y.T, s=1.5, color=theme.grid, linewidth=0, rasterized=True)
            axis.scatter(*path.x[k].T, s=2, color=theme.series[0], linewidth=0, rasterized=True)
            axis.set(
                xlim=(middle[0] - reach, middle[0] + reach),
                ylim=(middle[1] - reach, middle[1] + reach),
                xticks=[],
                yticks=[],
                aspect="equal",
            )
            axis.grid(False)
        row[0].set_ylabel(name)
    for axis, k in zip(axes[0], FRAMES, strict=True):
        axis.set_title(f"{k} step{'s' * (k != 1)}")
    return figure


def step_size(runs: list[Steps], theme: Theme) -> Figure:
    figure = Figure(figsize=(5.4, 2.9), layout="constrained")
    axis = figure.subplots()
    colours = (theme.series[2], theme.series[0], theme.series[1], theme.extra[0])
    for r, colour, marker in zip(runs, colours, "osD^", strict=True):
        axis.plot(
            SHOWN,
            r.distance,
            color=colour,
            marker=marker,
            markersize=4,
            label=f"blur {r.blur:g}, η = {r.eta:g}",
        )
    axis.set(xlabel="steps", ylabel="2-Wasserstein distance", ylim=(0, None))
    axis.legend(loc="upper left", bbox_to_anchor=(1.02, 1))
    return figure


def times(study: Study, theme: Theme) -> Figure:
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    axes = figure.subplots(1, len(study.times), sharey=True)
    for axis, t in zip(axes, study.times, strict=True):
        axis.plot([0, 1], [0, 1], color=theme.faint, linewidth=0.8)
        axis.scatter(t.exact, t.trained, s=3, color=theme.series[0], linewidth=0, alpha=0.6)
        axis.set(title=t.law, xlabel="E[t|x], exact", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes[0].set_ylabel("trained predictor")
    return figure


def images(study: Study, theme: Theme) -> Figure:
    rows = study.samples
    square = lambda x: x.view(-1, study.side, study.side)
    framed = [nn.functional.pad(square(x), (1, 1, 1, 1), value=-1) for x in rows.values()]
    mosaic = torch.cat([x.permute(1, 0, 2).reshape(study.side + 2, -1) for x in framed])
    figure = Figure(figsize=(6.8, 0.45 * len(rows)))
    axis = figure.add_axes((0.33, 0.01, 0.66, 0.98), anchor="W")
    axis.imshow(mosaic, cmap="gray_r", vmin=-1, vmax=1)
    axis.set(
        xticks=[],
        yticks=[(study.side + 2) * (k + 0.5) - 0.5 for k in range(len(rows))],
        yticklabels=[*rows],
    )
    axis.tick_params(length=0)
    axis.grid(False)
    for side in axis.spines.values():
        side.set_visible(False)
    return figure
