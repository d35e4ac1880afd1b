"""Figures of entropic transport: errors against passes, and pairs drawn from plans."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from torch import Tensor

from dfkernels._page.theme import Theme

if TYPE_CHECKING:
    from .sinkhorn import Study

_DASHES = ("-", (0, (4, 2)), (0, (1, 1)))


def errors(studies: dict[float, Study], theme: Theme) -> Figure:
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    axes = figure.subplots(1, len(studies), sharey=True, squeeze=False)[0]
    for axis, s in zip(axes, studies.values(), strict=True):
        for (name, curve), dash in zip(s.curves.items(), _DASHES, strict=True):
            passes = range(2, 2 * len(curve) + 2, 2)
            axis.plot(passes, curve, color=theme.faint, linestyle=dash, linewidth=1.4, label=name)
        schedules = s.schedules.values()
        axis.plot(
            [row.passes for row in schedules], [row.error for row in schedules],
            color=theme.series[1], marker="s", markersize=4, linewidth=1, label="schedule",
        )  # fmt: skip
        axis.plot(
            [s.start + 2 * t.iterations for t in s.stops], [t.error for t in s.stops],
            color=theme.series[0], marker="o", markersize=4, linewidth=1.6, label="ours",
        )  # fmt: skip
        axis.set(title=f"blur {s.blur}", xlabel="passes", xscale="log", yscale="log")
        axis.set_ylim(1e-7, 3)
    axes[0].set_ylabel("marginal error")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8
    )
    return figure


def couplings(studies: dict[float, Study], x: Tensor, y: Tensor, theme: Theme) -> Figure:
    figure = Figure(figsize=(8.6, 4.2), layout="constrained")
    axes = figure.subplots(1, len(studies), squeeze=False)[0]
    for axis, s in zip(axes, studies.values(), strict=True):
        partner = y[s.coupling.draw(seed=0)]
        for start, end in zip(x.tolist(), partner.tolist(), strict=True):
            ends = (start[0], end[0]), (start[1], end[1])
            axis.plot(*ends, color=theme.faint, linewidth=0.4, alpha=0.6)
        axis.scatter(*x.T, s=9, color=theme.series[0], label="x", zorder=3)
        axis.scatter(*y.T, s=9, color=theme.series[1], label="y", zorder=3)
        axis.set(title=f"blur {s.blur}", xlabel="$x_1$", aspect="equal")
        axis.grid(False)
    axes[0].set_ylabel("$x_2$")
    axes[0].legend(loc="upper left", fontsize=8)
    return figure
