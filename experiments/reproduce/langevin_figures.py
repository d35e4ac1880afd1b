"""Figures of the Langevin experiment: the published correction's angle, chains on their way, and
error against the number of steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, StrMethodFormatter

from dfkernels._page.theme import Theme

from .langevin_chains import AXES
from .langevin_published import EXPECTED
from .langevin_steps import NAMES

if TYPE_CHECKING:
    from .langevin_chains import Row
    from .langevin_published import Run
    from .langevin_steps import Steps


def correction(runs: list[Run], theme: Theme) -> Figure:
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    at = [run.steps for run in runs]
    for k, (name, colour) in enumerate((("first", theme.series[0]), ("median", theme.series[1]))):
        label = "first step" if name == "first" else "median over the steps"
        left.plot(at, [getattr(run, name) for run in runs], "o-", color=colour, label=label)
        left.plot(
            at, [EXPECTED[n][k] for n in at], "x", color=theme.ink, markersize=7, zorder=3,
            label="expected" if k else None,
        )  # fmt: skip
    left.set(yscale="log", ylabel="sine of the angle")
    left.set_title("What float32 turns")
    left.legend(fontsize=8)
    for name, mark, colour, label in (
        ("float32", "o-", theme.series[0], "corrected in float32"),
        ("noise", "x--", theme.series[1], "turned at random by as much"),
        ("float64", "^-", theme.series[2], "corrected in float64"),
    ):
        right.plot(at, [run.moved[name] for run in runs], mark, color=colour, label=label)
    right.set(yscale="log", ylabel="|x − baseline| / |baseline|")
    right.set_title("What becomes of the samples")
    right.legend(fontsize=8)
    for axis in (left, right):
        _counts(axis, at)
        axis.set_xlabel("steps")
    return figure


def chains(rows: list[Row], theme: Theme) -> Figure:
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    colours = (*theme.series, *theme.extra)
    for axis, direction, name in zip(panels, AXES, ("longest", "5th", "shortest"), strict=True):
        axis.axhline(1, color=theme.faint, linewidth=1)
        for row, colour in zip(rows, colours, strict=True):
            adjusted = row.acceptance is not None
            axis.plot(
                row.steps, row.ratios[:, direction], "-" if adjusted else "--", color=colour,
                label=row.name,
            )  # fmt: skip
        axis.set(xscale="log", xlabel="steps", ylim=(0, 2.1))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_title(f"{name} direction")
    panels[0].set_ylabel("variance / true variance")
    figure.legend(
        *panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3
    )
    return figure


def steps(found: list[Steps], floor: float, truth: float, theme: Theme) -> Figure:
    figure = Figure(figsize=(8.6, 3.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    at = [one.steps for one in found]
    colours = dict(zip(NAMES, (theme.ink, theme.faint, *theme.series, theme.extra[0]), strict=True))
    handles = []
    for name, label in NAMES.items():
        style = {"color": colours[name], "label": label, "marker": "o", "markersize": 4}
        dash = "--" if name in ("ddim", "heun") else "-"
        seen = [max(one.distance[name], floor / 4) for one in found]
        handles += left.plot(at, seen, dash, **style)
        off = [(one.log_prob[name] - truth) for one in found]
        right.plot(at, off, dash, **style)
        if name in found[0].path:
            middle.plot(at, [one.path[name] for one in found], dash, **style)
    left.axhspan(floor / 10, floor, color=theme.grid)
    left.text(1, floor / 9, "between draws from q", fontsize=7, color=theme.faint, va="bottom")
    left.set(yscale="log", ylim=(floor / 10, 20), ylabel="energy distance")
    left.set_title("Samples against q")
    middle.set(yscale="log", ylabel="KL(q ‖ p), nats")
    middle.set_title("Law of the path")
    right.axhline(0, color=theme.faint, linewidth=1)
    right.set(ylim=(-5.2, 2), ylabel="mean log q − that of draws, nats")
    right.set_title("log q of the samples")
    for axis in (left, middle, right):
        _counts(axis, at)
        axis.set_xlabel("steps")
    figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=3)
    return figure


def _counts(axis: Axes, at: list[int]) -> None:
    """A logarithmic axis with ticks at some of the numbers of steps."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator([n for n in at if n not in (6, 15)]))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
