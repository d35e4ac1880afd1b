"""Curves over the noise level, with their standard errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from ..audit.parts import Estimate, LevelAudit

Levels = tuple[LevelAudit, ...]
Pick = Callable[[LevelAudit], Estimate | None]
Unit = Callable[[LevelAudit], float]

HELD_OUT: dict[str, Any] = {"marker": "o", "markersize": 4.5, "linestyle": "-"}
TRAIN: dict[str, Any] = {
    "marker": "s",
    "markersize": 4.5,
    "linestyle": (0, (4, 2)),
    "markerfacecolor": "none",
}


class Curve(NamedTuple):
    """Numbers over the noise level, each [L]."""

    noise: np.ndarray
    value: np.ndarray
    error: np.ndarray  # standard errors


def curve(levels: Levels, pick: Pick, unit: Unit = lambda level: 1.0) -> Curve:
    """The levels' estimates, in units of `unit`, where there are any."""
    rows = [
        (level.noise, found.value / unit(level), found.error / unit(level))
        for level in levels
        if (found := pick(level)) is not None
    ]
    return Curve(*np.array(rows, dtype=np.float64).reshape(-1, 3).T)


def draw(axis: Axes, found: Curve, colour: str, label: str, **look: Any) -> None:
    """The curve, and a band of two standard errors on either side; nothing if it is empty."""
    if not found.noise.size:
        return
    low, high = found.value - 2 * found.error, found.value + 2 * found.error
    axis.fill_between(found.noise, low, high, color=colour, alpha=0.18, linewidth=0)
    axis.plot(found.noise, found.value, color=colour, label=label, **look)


def noise_axis(axis: Axes) -> None:
    axis.set_xscale("log")
    axis.set_xlabel("noise level σ/α, in units of the data")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def reference(axis: Axes, value: float, text: str, colour: str) -> None:
    """A line at what a sound network has, and beside it what that is."""
    axis.axhline(value, color=colour, linewidth=0.9, linestyle=(0, (1, 1.5)), zorder=1)
    axis.annotate(
        text,
        (1, value),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
        color=colour,
    )
