"""The figure of bench.scale: predicted against measured, and the model on paper, for a light and a
dark page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from dfkernels._page.theme import DARK, LIGHT, Theme, png

from . import paper

MARKERS = {"memory": "o", "page cache": "s", "disk": "^"}
LINES = (  # (number in paper.STORES, GPUs or None for as many as hold them)
    (0, None, "-"),
    (1, None, "-"),
    (2, 64, "-"),
    (2, 8, "--"),
)


def draw(rows: list[dict], folder: Path) -> None:
    """scale-light.png and scale-dark.png."""
    for theme in (LIGHT, DARK):
        picture = png(lambda theme=theme: figure(rows, theme), theme, 150)
        (folder / f"scale-{theme.name}.png").write_bytes(picture)


def figure(rows: list[dict], theme: Theme) -> Figure:
    found = Figure(figsize=(9.4, 4.2), layout="constrained")
    left, right = found.subplots(1, 2)
    measured(left, rows, theme)
    on_paper(right, theme)
    for axis in (left, right):
        axis.set(xscale="log", yscale="log")
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            ticks.set_minor_formatter(NullFormatter())
    return found


def measured(axis: Axes, rows: list[dict], theme: Theme) -> None:
    """The passes that were timed: the floor beside the prediction."""
    kinds = {
        "in memory": ("memory", "1", theme.series[0]),
        "files in the page cache": ("page cache", "1", theme.series[1]),
        "files on the disk": ("disk", "1", theme.series[2]),
        "two ranks": ("page cache", "2", theme.extra[0]),
    }
    for name, (store, ranks, colour) in kinds.items():
        chosen = [r for r in rows if r["store"] == store and r["ranks"] == ranks]
        x, y, least = (
            [float(r[key]) for r in chosen] for key in ("predicted_s", "measured_s", "floor_s")
        )
        axis.plot(x, y, MARKERS[store], color=colour, label=name, markersize=5, zorder=3)
        axis.plot(least, y, MARKERS[store], color=colour, mfc="none", markersize=5, alpha=0.5)
    times = [float(r[key]) for r in rows for key in ("floor_s", "predicted_s", "measured_s")]
    ends = [min(times) / 1.5, max(times) * 1.5]
    axis.plot(ends, ends, color=theme.faint, linewidth=1)
    axis.plot([], [], "o", color=theme.faint, mfc="none", markersize=5, label="the machine's floor")
    axis.set(xlabel="predicted, seconds", ylabel="measured, seconds", title="A pass on two cores")
    axis.legend(loc="upper left", fontsize=8)


def on_paper(axis: Axes, theme: Theme) -> None:
    B = np.unique(np.logspace(0, 5, 101).round())
    colours = [theme.series[0], theme.series[1], theme.series[2], theme.series[2]]
    for (number, gpus, style), colour in zip(LINES, colours, strict=True):
        store = paper.STORES[number]
        gpus = gpus or paper.needed(store, 1)
        times = [sum(paper.seconds(store, 1, gpus, int(b))) for b in B]
        axis.plot(B, times, style, color=colour, label=f"{store.name}, {gpus} GPUs")
    axis.set(
        xlabel="queries B", ylabel="seconds", title="10⁹ latents of 16,384 uint8, H200, on paper"
    )
    axis.legend(loc="upper left", fontsize=8)
