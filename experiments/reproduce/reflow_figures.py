"""Figures of reflow: what is left of the law and of the bending round by round, samples, and the
collapse where everything is linear."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

from dfkernels._page.theme import Theme

from .reflow_linear import EARLIER, autoencoder

if TYPE_CHECKING:
    from .reflow_linear import Flow
    from .reflow_networks import Study

_MARKS = ("o", "s", "^", "D", "v")
_REACH = 2.3  # of the samples that are drawn
_POINTS = 1500


def _colours(theme: Theme) -> tuple[str, ...]:
    return (*theme.series, *theme.extra)


def networks(studies: dict[str, Study], theme: Theme) -> Figure:
    """Energy distance of the fine flow and of one step, recall, straightness, by round."""
    figure = Figure(figsize=(10.2, 2.9 * len(studies) + 0.4), layout="constrained")
    axes = figure.subplots(len(studies), 4, squeeze=False)
    panels = (
        ("Energy distance, Heun", lambda r: 1e3 * r.laws["Heun"].energy, "×10⁻³"),
        ("Energy distance, 1 step", lambda r: 1e3 * r.laws["1 step"].energy, "×10⁻³"),
        ("Recall, Heun", lambda r: 100 * r.laws["Heun"].recall, "%"),
        ("Straightness", lambda r: r.straight.value, ""),
    )
    for row, (name, study) in zip(axes, studies.items(), strict=True):
        for axis, (title, value, unit) in zip(row, panels, strict=True):
            for (kind, rounds), colour, mark in zip(
                study.rounds.items(), _colours(theme), _MARKS, strict=False
            ):
                x = range(1, len(rounds) + 1)
                style = {"color": colour, "marker": mark, "markersize": 4, "linewidth": 1.4}
                axis.plot(x, [value(r) for r in rounds], label=kind, **style)
            axis.set_title(title)
            axis.set(xlabel="round", ylabel=unit, xticks=list(x))
        row[0].set_ylabel(f"{name}, ×10⁻³")
        for axis, floor in ((row[0], 1e3 * study.real.energy), (row[2], 100 * study.real.recall)):
            axis.axhline(floor, color=theme.faint, linestyle="--", linewidth=1)
            axis.set_ylim(bottom=0)
        for axis in (row[1], row[3]):
            axis.set_yscale("log")
            axis.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8
    )
    return figure


def samples(studies: dict[str, Study], theme: Theme) -> Figure:
    """Samples of the last round of each kind beside the data."""
    columns = len(next(iter(studies.values())).samples)
    figure = Figure(figsize=(10.2, 1.7 * len(studies) + 0.2), layout="constrained")
    axes = figure.subplots(len(studies), columns, squeeze=False)
    for i, (row, (name, study)) in enumerate(zip(axes, studies.items(), strict=True)):
        for axis, (what, points) in zip(row, study.samples.items(), strict=True):
            if points.shape[1] == 2:
                style = {"s": 1.2, "color": theme.series[0], "linewidths": 0}
                axis.scatter(*points[:_POINTS].T, **style)
                axis.set(xlim=(-_REACH, _REACH), ylim=(-_REACH, _REACH))
                axis.set_aspect("equal")
            else:
                axis.imshow(_tiles(points), cmap="gray", vmin=-1, vmax=2, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            if i == 0:
                axis.set_title(what, fontsize=8)
        row[0].set_ylabel(name, fontsize=8)
    return figure


def _tiles(points: Tensor) -> Tensor:
    """The first 16 images of 8 x 8 pixels as one, with gaps."""
    images = torch.nn.functional.pad(points[:16].view(4, 4, 8, 8), (1, 1, 1, 1), value=torch.nan)
    return images.transpose(1, 2).reshape(40, 40)


def linear(flows: dict[tuple[str, float], Flow], theme: Theme) -> Figure:
    """The top eigenvalue of linear flows by round, and the variance of autoencoders."""
    figure = Figure(figsize=(8.6, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for ((real, share), flow), colour, mark in zip(
        ((key, flow) for key, flow in flows.items() if key[1] < 0.5),
        _colours(theme),
        _MARKS,
        strict=False,
    ):
        mean, spread = flow.fine.mean(1), flow.fine.std(1)
        rounds = torch.arange(1, len(mean) + 1)
        name = real if real == "none" else f"{real}, {100 * share:.0f} %"
        left.plot(rounds, mean, color=colour, label=name)
        left.fill_between(
            rounds, mean - spread, mean + spread, color=colour, alpha=0.18, linewidth=0
        )
        earlier = {k: v for k, v in EARLIER[real, share][0].items() if k <= len(mean)}
        left.plot(list(earlier), list(earlier.values()), mark, color=colour, markersize=4.5)
    left.set(
        xlabel="round",
        ylabel="top eigenvalue / the truth's",
        ylim=(0, 1.1),
        xticks=(1, 5, 10, 15, 20),
    )
    left.set_title("Linear flow, ridge 0.05")
    left.legend(fontsize=8, title="real pairs", title_fontsize=8, loc="lower left")
    for share, colour in zip((0.0, 0.1, 0.3, 0.5), _colours(theme), strict=False):
        values: list[float] | Tensor = [1.0, *autoencoder(0.1, share, 50)]
        right.plot(range(51), values, color=colour, label=f"{100 * share:.0f} %")
    right.set(xlabel="round", ylabel="variance", ylim=(0, 1.05))
    right.set_title("Linear autoencoder, σ² = 0.1")
    right.legend(fontsize=8, title="real data", title_fontsize=8, ncols=2)
    return figure
