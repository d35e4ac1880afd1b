"""Figures of the adjoint experiment: the images before and after, and quality against wall time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from dfkernels._page.theme import Theme

from .section import Picture

if TYPE_CHECKING:
    from .adjoint_study import Study

_SHOWN = 12  # images in a row


def pictures(studies: list[Study]) -> list[Picture]:
    """The images of each study, then one figure of all their curves."""
    images = [
        Picture(
            f"images-{study.setting.name.lower()}",
            f"{study.setting.name}: samples before guidance and after it, by each form of F; above"
            " them the wanted class. Framed in green where the judge, a classifier that guidance"
            " never saw, sees that class.",
            lambda theme, study=study: _images(study, theme),
        )
        for study in studies
    ]
    return [
        *images,
        Picture(
            "quality",
            "The judge's log-probability of the wanted class, mean over the samples (of each the"
            " best state so far), against wall time: a marker per step of guidance. Up and to the"
            " left is better.",
            lambda theme: _quality(studies, theme),
        ),
    ]


def _images(study: Study, theme: Theme) -> Figure:
    wanted, shown = study.setting.wanted, min(_SHOWN, len(study.setting.wanted))
    rows = {"before": study.before, **{row: o.guided.x0 for row, o in study.outcomes.items()}}
    figure = Figure(figsize=(1.5 + 0.62 * shown, 0.4 + 0.66 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), shown)
    for line, (name, x0) in zip(axes, rows.items(), strict=True):
        seen = _seen(study, x0)
        for column, axis in enumerate(line):
            axis.imshow(x0[column, 0], cmap="gray", vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            right = bool(seen[column] == wanted[column])
            axis.spines[:].set(visible=True, linewidth=2 if right else 0.8)
            axis.spines[:].set_color(theme.series[2] if right else theme.grid)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", color=theme.ink)
    for axis, label in zip(axes[0], wanted.tolist(), strict=False):
        axis.set_title(str(label), loc="center")
    return figure


def _seen(study: Study, x0: Tensor) -> Tensor:
    with torch.no_grad():
        return study.setting.judge(x0).argmax(1)


def _quality(studies: list[Study], theme: Theme) -> Figure:
    names = list(dict.fromkeys(row for study in studies for row in study.outcomes))
    colours = [*theme.series, *theme.extra]
    size = (2.2 + 3.9 * len(studies), 3.8)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(studies), squeeze=False)
    for axis, study in zip(axes[0], studies, strict=True):
        for i, row in enumerate(names):
            if row in study.outcomes:
                outcome = study.outcomes[row]
                style = {
                    "color": colours[i % len(colours)],
                    "marker": "o",
                    "markersize": 2.5,
                    "linewidth": 1.4,
                }
                dash = "-" if i < len(colours) else (0, (3, 1.5))
                axis.plot(outcome.seconds, outcome.best.mean(1), linestyle=dash, label=row, **style)
        axis.set(title=study.setting.name, xlabel="seconds", xscale="log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    axes[0, 0].set_ylabel("judge: log p(wanted class)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure
