"""Figures of Table 3: where the map twists, how the asymmetry is distributed, how it depends on the
steps."""

from __future__ import annotations

import math

import torch
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from torch import Tensor

from dfkernels._page.theme import Theme
from dfkernels.cloud import PointCloud
from dfkernels.methods.grid import time_grid
from dfkernels.methods.transport import TransportTest, transport_test
from dfkernels.schedule import EDM

from .section import Picture

TITLES = {
    "authors": "Authors' convention",
    "slide": "Slide: $A^\\mathsf{T}B$",
    "jacobian": "True Jacobian",
}
REACH, LEAST = 1.6, 0.02  # of the noise plane; the noise level at the end
HALFWAY = 17  # of the 40 levels drawn: sigma = 0.17, where the chains decide


def pictures(y: Tensor, published, sweep, counts, paper) -> list[Picture]:
    """The three figures; each is drawn when asked for."""
    return [
        Picture(
            "transport_twist",
            "Where on the noise plane (σ = 1) the map fails to be optimal transport. Left: the"
            " asymmetry of the Jacobian at each start, with the three atoms and the borders between"
            " their basins. Middle: the angle through which the Jacobian turns (its polar factor;"
            " an optimal-transport map turns nowhere). Right: chains, and at σ = 0.17 the images of"
            " small circles about their starts, coloured as on the left and rescaled to one size.",
            lambda theme: twist(y, theme),
        ),
        Picture(
            "transport_distribution",
            "Share of the chains with an asymmetry below a value, at 999 steps. Of an"
            " optimal-transport map all chains stand at 0. The slide's convention hides the"
            " asymmetry.",
            lambda theme: distribution(published, theme),
        ),
        Picture(
            "transport_steps",
            "Mean asymmetry against the number M of time levels on the authors' grid, uniform in t;"
            " bars: the paper's numbers. At M = 20, their default, nothing has converged.",
            lambda theme: steps(sweep, counts, paper, theme),
        ),
    ]


def angle(A: Tensor) -> Tensor:
    """Degrees by which the orthogonal polar factor of A [..., 2, 2] turns, for det A > 0."""
    return torch.atan2(A[..., 1, 0] - A[..., 0, 1], A[..., 0, 0] + A[..., 1, 1]).rad2deg()


def _map(y: Tensor, x: Tensor, stop: float) -> TransportTest:
    """From noise level 1 to `stop` in 400 steps, uniform in ln sigma."""
    return transport_test(PointCloud(y), EDM(), time_grid(EDM(), 400, (stop, 1.0)), x=x)


def twist(y: Tensor, theme: Theme) -> Figure:
    neutral = "#f4f4f4" if theme.name == "light" else "#24282e"
    signed = LinearSegmentedColormap.from_list(
        "signed", [theme.series[0], neutral, theme.series[1]]
    )
    share = LinearSegmentedColormap.from_list("share", [neutral, theme.series[2]])
    figure = Figure(figsize=(10.2, 3.7), layout="constrained")
    axes = figure.subplots(1, 3)
    side = torch.linspace(-REACH, REACH, 241, dtype=torch.float64)
    end = _map(y, torch.cartesian_prod(side, side), LEAST)
    basin = (end.x[:, None] - y).norm(dim=2).argmin(1)
    maps = (
        ("Asymmetry at each start $x_T$", 100 * end.asymmetry, share, Normalize(0, 100), "%"),
        ("Turn of the map", angle(end.A), signed, Normalize(-25, 25), "degrees"),
    )
    for axis, (title, values, colours, norm, unit) in zip(axes, maps, strict=False):
        image = axis.pcolormesh(
            side, side, values.reshape(241, 241).T, cmap=colours, norm=norm, rasterized=True
        )
        for i in range(len(y)):
            inside = (basin == i).double().reshape(241, 241).T
            axis.contour(side, side, inside, levels=[0.5], colors=theme.ink, linewidths=0.6)
        axis.set(title=title, xlabel="$x_1$", xlim=(-REACH, REACH), ylim=(-REACH, REACH))
        figure.colorbar(image, ax=axis, shrink=0.6, label=unit)

    last = axes[2]
    start = torch.cartesian_prod(
        *[torch.linspace(low, low + 1.5, 7, dtype=torch.float64) for low in (-0.4, -1.1)]
    )
    levels = torch.logspace(0, math.log10(LEAST), 41, dtype=torch.float64)[1:].tolist()
    tests = [_map(y, start, level) for level in levels]
    last.plot(
        *torch.stack([start, *[test.x for test in tests]]).unbind(2),
        color=theme.faint,
        linewidth=0.6,
    )
    now = tests[HALFWAY]
    axes_of, sizes, _ = torch.linalg.svd(now.A)
    tilt = torch.atan2(axes_of[:, 1, 0], axes_of[:, 0, 0]).rad2deg()
    for place, size, slope, odd in zip(
        now.x, sizes, tilt.tolist(), now.asymmetry.tolist(), strict=True
    ):
        width, height = (0.055 * size).tolist()
        face = {"facecolor": share(odd), "edgecolor": theme.ink, "linewidth": 0.5, "zorder": 3}
        last.add_patch(Ellipse(tuple(place.tolist()), width, height, angle=slope, **face))
    last.set(title="Chains, and circles they carry", xlabel="$x_1$")
    for axis in axes:
        axis.set_aspect("equal")
        axis.grid(False)
        axis.scatter(
            *y.T, s=26, color=theme.extra[0], edgecolor=theme.paper, linewidth=0.8, zorder=4
        )
    axes[0].set_ylabel("$x_2$")
    return figure


def _colours(theme: Theme) -> list[str]:
    return [*theme.series, theme.extra[0]]


def distribution(published: dict[str, dict[str, TransportTest]], theme: Theme) -> Figure:
    figure = Figure(figsize=(8.6, 2.9), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (convention, title) in zip(axes, TITLES.items(), strict=True):
        for (name, test), colour, dash in zip(
            published[convention].items(),
            _colours(theme),
            ("-", "-", (0, (4, 2)), (0, (1, 1))),
            strict=True,
        ):
            ordered = test.asymmetry.sort().values[:: max(1, len(test.asymmetry) // 2000)]
            share = torch.linspace(0, 1, len(ordered))
            axis.plot(100 * ordered, 100 * share, color=colour, linestyle=dash, label=name)
        axis.set(title=title, xlabel="asymmetry, %", xlim=(-2, 102), ylim=(0, 102))
    axes[0].set_ylabel("share of chains, %")
    axes[-1].legend(loc="lower right", fontsize=8)
    return figure


def steps(sweep, counts, paper: dict[str, float], theme: Theme) -> Figure:
    figure = Figure(figsize=(8.6, 2.9), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (convention, title) in zip(axes, TITLES.items(), strict=True):
        for (name, found), colour, marker in zip(
            sweep[convention].items(), _colours(theme), "osD^", strict=True
        ):
            means = [100 * s.mean for s in found]
            axis.plot(
                counts,
                means,
                color=colour,
                marker=marker,
                markersize=3.5,
                linewidth=1.4,
                label=name,
            )
            axis.axhline(paper[name], xmin=0.94, color=colour, linewidth=2.5)
        axis.set(title=title, xlabel="M", xscale="log", ylim=(0, 60))
    axes[0].set_ylabel("mean asymmetry, %")
    axes[0].legend(fontsize=8)
    return figure
