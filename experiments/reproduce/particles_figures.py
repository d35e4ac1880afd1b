"""Figures of the particle flows: distance against steps, and particles over their target."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from dfkernels._page.theme import Theme

from .particles_laws import Law

if TYPE_CHECKING:
    from .particles_study import Ending, Size

STEPS = (
    "W2 between the particles and draws of a Gaussian with condition number 41 in ten dimensions."
    " Dashed: as many independent draws of it."
)
PLANE = (
    "Particles after the accelerated flow; the area of each is its weight. Lines: the target's"
    " density, three quarters of whose mass is on the right."
)


def steps(curves: dict[str, list[float]], floor: float, size: Size, theme: Theme) -> Figure:
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    axis = figure.subplots()
    colours = [*theme.series, *theme.extra]
    for (name, values), colour, mark in zip(curves.items(), colours, "osD^v", strict=False):
        axis.plot(
            size.steps, values, marker=mark, markersize=4.5, color=colour, linewidth=1.5, label=name
        )
    axis.axhline(floor, color=theme.faint, linestyle="--", linewidth=1)
    axis.set(xscale="log", xlabel="steps, each one evaluation of the target's score", ylabel="W2")
    axis.set_xticks(size.steps)
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_title("Velocities: tens of steps in place of hundreds")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def plane(endings: dict[str, Ending], law: Law, theme: Theme) -> Figure:
    figure = Figure(figsize=(8.6, 2.6), layout="constrained")
    axes = figure.subplots(1, len(endings), sharey=True)
    side = torch.linspace(-6.5, 6.5, 131, dtype=torch.float64)
    tall = torch.linspace(-4, 4, 81, dtype=torch.float64)
    density = law.log_density(torch.cartesian_prod(side, tall)).exp().reshape(131, 81).T
    levels = (density.max() * torch.tensor([0.02, 0.1, 0.3, 0.7])).tolist()
    for axis, (name, ending) in zip(axes, endings.items(), strict=True):
        p = ending.particles
        axis.contour(side, tall, density, levels=levels, colors=theme.faint, linewidths=0.8)
        axis.scatter(
            *p.x.T, s=(14 * len(p) * p.weights).tolist(), color=theme.series[0], alpha=0.75,
            edgecolor=theme.paper, linewidth=0.3, zorder=3,
        )  # fmt: skip
        axis.set(xlabel="$x_1$", xlim=(-6.5, 6.5), ylim=(-4, 4))
        axis.set_aspect("equal")
        axis.grid(False)
        axis.set_title(f"{name}\n{100 * ending.distance.mass:.0f} % on the right", fontsize=9)
    axes[0].set_ylabel("$x_2$")
    return figure
